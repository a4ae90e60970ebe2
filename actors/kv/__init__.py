"""The KV store: blocks of KV that outlive the device, in host memory, on disk, on other hosts.

Nothing here imports torch but what runs in a rank (`writer`, `loader`), so that the
store's own process starts fast.
"""
