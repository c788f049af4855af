// The page: loads the model folder named by ?model=..., streams text as it is generated.
import { env, AutoModelForCausalLM, AutoTokenizer, TextStreamer } from "@huggingface/transformers";

const query = new URLSearchParams(location.search);
const name = query.get("model") ?? "model";
const nTokens = Number(query.get("n") ?? 64);
const [status, text, go, prompt] = ["status", "text", "go", "prompt"].map((id) => document.getElementById(id));
document.getElementById("name").textContent = name;

env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = new URL("./", location.href).pathname; // a path: whole addresses count as remote
env.useBrowserCache = false;
env.backends.onnx.wasm.wasmPaths = new URL("./node_modules/onnxruntime-web/dist/", location.href).href;

const began = performance.now();
try {
  const [tokenizer, model] = await Promise.all([
    AutoTokenizer.from_pretrained(name),
    AutoModelForCausalLM.from_pretrained(name, { device: "wasm", dtype: "fp32" }), // as the file is
  ]);
  const seconds = ((performance.now() - began) / 1000).toFixed(1);
  status.textContent = `loaded in ${seconds} s`;
  go.disabled = false;
  go.addEventListener("click", () => answer(tokenizer, model));
  if (query.has("run")) await answer(tokenizer, model);
} catch (error) {
  status.textContent = `failed: ${error.message ?? error}`;
  document.body.dataset.done = "failed";
}

async function answer(tokenizer, model) {
  go.disabled = true;
  text.textContent = prompt.value;
  const inputs = tokenizer(prompt.value);
  const ids = [];
  const streamer = new TextStreamer(tokenizer, {
    skip_prompt: true,
    callback_function: (piece) => (text.textContent += piece),
    token_callback_function: (tokens) => ids.push(...tokens.map(Number)),
  });
  const start = performance.now();
  await model.generate({ ...inputs, max_new_tokens: nTokens, do_sample: false, streamer });
  const seconds = (performance.now() - start) / 1000;
  const speed = seconds > 0.01 ? `, ${(ids.length / seconds).toFixed(1)} per second` : "";
  status.textContent = `${ids.length} tokens${speed}`;
  document.body.dataset.tokens = JSON.stringify(ids);
  document.body.dataset.done = "yes";
  go.disabled = false;
}
