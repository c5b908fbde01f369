// SPDX-License-Identifier: Apache-2.0
// The dashboard: reads /v1/kv_cache once, then follows its event stream.

import { Unauthorized, events, getJSON, hasKey, problem, request, setKey } from "./api.js";
import { compare } from "./base.js";
import { drawLayers, drawSpark, drawUse } from "./chart.js";
import { bits, bytes, count, percent, rate, times } from "./format.js";
import { setUp } from "./playground.js";

const SECONDS = 300;
const RETRY_MILLISECONDS = 2000;
const $ = (id) => document.getElementById(id);
let cache = null;
let model = "";
let samples = [];

// `data-value` keeps the number as the API gave it, for scripts that read the page.
function show(id, value, text) {
  $(id).textContent = text;
  $(id).dataset.value = value;
}

function status(state, text) {
  $("status").dataset.state = state;
  $("status").textContent = text;
}

function showLayout() {
  const plain = cache.uncompressed;
  document.title = `${model} · KV cache`;
  $("model").textContent = model;
  $("summary").textContent = cache.kv_ratio === 1
    ? `${bytes(cache.pool_bytes)} of KV cache, uncompressed, ${cache.kv_cache_dtype}`
    : `${bytes(cache.pool_bytes)} of KV cache at ${percent(cache.kv_ratio)} of its full size, `
      + cache.kv_cache_dtype;
  show("pool-bytes", cache.pool_bytes, bytes(cache.pool_bytes));
  show("capacity", cache.tokens.capacity, count(cache.tokens.capacity));
  show("capacity-plain", plain.tokens_capacity, count(plain.tokens_capacity));
  show("bytes-per-token", cache.bytes_per_token, count(cache.bytes_per_token));
  show("bytes-plain", cache.uncompressed_bytes_per_token,
    count(cache.uncompressed_bytes_per_token));
  show("ratio", cache.kv_ratio, cache.kv_ratio.toFixed(3));
  show("possible", cache.concurrency.possible, times(cache.concurrency.possible));
  show("possible-plain", cache.concurrency.possible_uncompressed,
    times(cache.concurrency.possible_uncompressed));
  show("max-len", cache.max_model_len, count(cache.max_model_len));
  $("ranks-table").replaceChildren(...cache.layers.map((layer) => {
    const row = document.createElement("tr");
    for (const text of [layer.layer, layer.rank_k, bits(layer.bits_k), layer.rank_v,
      bits(layer.bits_v), count(layer.bytes_per_token)]) {
      row.insertCell().textContent = text;
    }
    return row;
  }));
  drawBars();
}

// A chart of bits only where they differ: 16 everywhere, or fp8, is said by the summary.
function drawBars() {
  drawLayers($("ranks-chart"), cache.layers, "rank");
  const widths = cache.layers.flatMap((layer) => [layer.bits_k, layer.bits_v]);
  $("bits").hidden = new Set(widths).size < 2;
  drawLayers($("bits-chart"), cache.layers, "bits");
}

function showSample(sample) {
  show("used-bytes", sample.used_bytes, bytes(sample.used_bytes));
  show("saved-bytes", sample.saved_bytes, bytes(sample.saved_bytes));
  show("used-tokens", sample.used_tokens, count(sample.used_tokens));
  show("generation", sample.generation_tokens_per_second,
    rate(sample.generation_tokens_per_second));
  show("prompt", sample.prompt_tokens_per_second, rate(sample.prompt_tokens_per_second));
  show("running", sample.running, count(sample.running));
  show("waiting", sample.waiting, count(sample.waiting));
  show("preemptions", sample.preemptions, count(sample.preemptions));
  show("hit-rate", sample.prefix_hit_rate, percent(sample.prefix_hit_rate));
  const used = sample.used_bytes / cache.pool_bytes;
  const plain = sample.uncompressed_bytes / cache.pool_bytes;
  $("meter-fill").style.width = percent(used).replace(" ", "");
  $("meter-plain").style.width = percent(Math.min(1, plain)).replace(" ", "");
  $("meter").setAttribute("aria-label",
    `${percent(used)} of the pool in use; uncompressed it would be ${percent(plain)}`);
}

function draw() {
  if (!cache) return;
  drawUse($("use-chart"), samples, cache.pool_bytes, SECONDS);
  drawSpark($("rate-chart"), samples, (sample) => sample.generation_tokens_per_second, SECONDS);
  drawSpark($("queue-chart"), samples, (sample) => sample.running, SECONDS);
}

function add(sample) {
  samples = samples.filter((old) => old.time > sample.time - SECONDS && old.time < sample.time);
  samples.push(sample);
  showSample(sample);
  draw();
}

// One connection, until it breaks; then it starts anew, with the history.
async function follow() {
  cache = await getJSON("v1/kv_cache");
  model = (await getJSON("v1/models")).data[0].id;
  samples = (await getJSON(`v1/kv_cache/history?seconds=${SECONDS}`)).samples;
  showLayout();
  if (samples.length) showSample(samples.at(-1));
  draw();
  const answer = await request("v1/kv_cache/stream");
  if (!answer.ok) throw new Error(await problem(answer));
  status("live", "live");
  for await (const data of events(answer)) add(JSON.parse(data));
  throw new Error("the server closed the stream");
}

async function run() {
  for (;;) {
    try {
      await follow();
    } catch (error) {
      if (error instanceof Unauthorized) await askKey(hasKey());
      else {
        status("down", `no connection: ${error.message}`);
        await new Promise((done) => setTimeout(done, RETRY_MILLISECONDS));
      }
    }
  }
}

// Resolves once the user has given a key; "Cancel" leaves the page waiting for the button.
let asking = null;
function askKey(wrong = false) {
  const dialog = $("key-dialog");
  status("wait", "needs an API key");
  $("key-error").textContent = wrong ? "The server does not accept this key." : "";
  if (!dialog.open) dialog.showModal();
  $("key").value = "";
  $("key").focus();
  asking ??= Promise.withResolvers();
  return asking.promise;
}

function theme() {
  const names = ["auto", "light", "dark"];
  const apply = (name) => {
    if (name === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    localStorage.setItem("vllm-eigen-theme", name);
    $("theme-button").textContent = name[0].toUpperCase() + name.slice(1);
    $("theme-button").setAttribute("aria-label", `Colour theme: ${name}`);
  };
  let current = Math.max(0, names.indexOf(localStorage.getItem("vllm-eigen-theme")));
  apply(names[current]);
  $("theme-button").addEventListener("click", () => {
    current = (current + 1) % names.length;
    apply(names[current]);
  });
}

$("key-form").addEventListener("submit", (event) => {
  const key = $("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) {
    $("key-error").textContent = "A key has only printable characters and no spaces.";
    event.preventDefault();
    return;
  }
  setKey(key);
  if (asking) asking.resolve();
  else location.reload();
  asking = null;
});
$("key-cancel").addEventListener("click", () => $("key-dialog").close());
$("key-button").addEventListener("click", () => {
  $("key-error").textContent = "";
  $("key-dialog").showModal();
});
new ResizeObserver(() => {
  draw();
  if (cache) drawBars();
}).observe($("main"));
theme();
setUp(() => model, () => askKey(hasKey()));
compare(() => getJSON("v1/kv_cache"));
run();
