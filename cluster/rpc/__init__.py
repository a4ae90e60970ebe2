"""gRPC: the service ``ringspan.v1.Inference``, see ``ringspan_v1.proto``.

After a change of the proto: ``make proto`` (it needs grpcio-tools and nothing else does).
"""
