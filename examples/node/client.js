// Node.js with stubs that are made from the proto when the program starts.
//
//     npm install && npm start
//
// $NANOVLLM_ADDRESS is the scheduler's address, 127.0.0.1:50051 if unset.

import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const protos = fileURLToPath(new URL("../../protos", import.meta.url));
const definition = protoLoader.loadSync("nanovllm/v1/inference.proto", {
  includeDirs: [protos],
  // Unset optional fields stay unset, and 64-bit numbers keep their precision.
  defaults: false,
  enums: String,
  longs: String,
});
const { InferenceService } = grpc.loadPackageDefinition(definition).nanovllm.v1;

const address = process.env.NANOVLLM_ADDRESS ?? "127.0.0.1:50051";
const client = new InferenceService(address, grpc.credentials.createInsecure());

function generate(request) {
  return new Promise((resolve, reject) => {
    const call = client.Generate(request, { deadline: Date.now() + 120_000 });
    let last;
    call.on("data", (delta) => {
      process.stdout.write(delta.text ?? "");
      last = delta;
    });
    call.on("error", reject);
    call.on("end", () => resolve(last));
  });
}

const last = await generate({
  chat: { messages: [{ role: "user", content: "Name three rivers in France." }] },
  samplingParams: { temperature: 0, maxTokens: 48 },
});
console.log(`\n[${last.finishReason}, ${last.usage.completionTokens} tokens]`);

try {
  await generate({ text: "The sea is", samplingParams: { topP: 2 } });
} catch (error) {
  console.log(`refused: ${grpc.status[error.code]} ${error.details}`);
}
client.close();
