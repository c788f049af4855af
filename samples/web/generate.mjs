// Greedy tokens of a model folder in transformers.js on Node, one JSON line.
//
//     node generate.mjs MODEL_FOLDER N TOKEN [TOKEN ...]
import path from "node:path";
import { env, AutoModelForCausalLM, Tensor } from "@huggingface/transformers";

const [folder, n, ...prompt] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(path.resolve(folder)) + path.sep;

const model = await AutoModelForCausalLM.from_pretrained(path.basename(folder));
const ids = prompt.map(BigInt);
const dims = [1, ids.length];
const output = await model.generate({
  inputs: new Tensor("int64", BigInt64Array.from(ids), dims),
  attention_mask: new Tensor("int64", new BigInt64Array(ids.length).fill(1n), dims),
  max_new_tokens: Number(n),
  do_sample: false,
});
console.log(JSON.stringify(output.tolist()[0].slice(ids.length).map(Number)));
process.exit(0); // sessions keep threads
