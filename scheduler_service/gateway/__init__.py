"""vllm.grpc.engine.VllmEngine over the same engine, for gateways that speak vLLM's gRPC protocol.

Needs the extra `gateway`, which brings the stubs (PyPI `smg-grpc-proto`, Apache-2.0). What is not
supported is refused by name. How the gateway smg uses the protocol is in docs/clients.md.
"""
