#!/bin/sh
# buf curl learns the API from the server by reflection; no protos and no stubs are needed.
#
#     sh examples/buf_curl.sh
#
# $NANOVLLM_ADDRESS is the scheduler's address, 127.0.0.1:50051 if unset.
set -eu
url="http://${NANOVLLM_ADDRESS:-127.0.0.1:50051}"

call() {
  buf curl --protocol grpc --http2-prior-knowledge --data "$2" "$url/$1"
}

call grpc.health.v1.Health/Check '{}'
call nanovllm.v1.InferenceService/GetModelInfo '{}'
call nanovllm.v1.InferenceService/Generate '{
  "text": "The sea is",
  "samplingParams": {"maxTokens": 16, "temperature": 0}
}'
# What gateways use.
call vllm.grpc.engine.VllmEngine/HealthCheck '{}' || echo "(needs the extra gateway)"
