"""``ringspan doctor``: what is wrong with this machine, installation or checkpoint, and what to do.

It is to work where something central is broken. So nothing here imports torch or Ray: what
needs them runs in a process of its own (`cluster.doctor.probes`), and its facts are judged here.
"""
