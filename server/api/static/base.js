// SPDX-License-Identifier: Apache-2.0
// `/dashboard?base=URL` shows that server's numbers beside ours, e.g. those of the
// uncompressed model. It gets no key of ours: what it shows it must show anyone.

import { bytes, count, rate, times } from "./format.js";

const MILLISECONDS = 2000;
const $ = (id) => document.getElementById(id);
export const ROWS = [
  ["KV pool", (cache) => cache.pool_bytes, bytes],
  ["Bytes per token", (cache) => cache.bytes_per_token, count],
  ["Tokens the pool holds", (cache) => cache.tokens.capacity, count],
  ["Full-length sequences", (cache) => cache.concurrency.possible, times],
  ["Tokens in use", (cache) => cache.tokens.used, count],
  ["Requests running", (cache) => cache.requests.running, count],
  ["Requests waiting", (cache) => cache.requests.waiting, count],
  ["Preemptions", (cache) => cache.requests.preemptions, count],
  ["Generated tokens/s", (cache) => cache.throughput.generation_tokens_per_second, rate],
];

export const quotient = (ours, base) => (base > 0 ? (ours / base).toFixed(2) : "–");

async function fetchBase(url) {
  const answer = await fetch(`${url.replace(/\/+$/, "")}/v1/kv_cache`,
    { cache: "no-store", credentials: "omit" });
  if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
  return answer.json();
}

function show(ours, base) {
  $("base-table").replaceChildren(...ROWS.map(([name, value, text]) => {
    const row = document.createElement("tr");
    const pair = [value(base), value(ours)];
    for (const cell of [name, ...pair.map(text), quotient(pair[1], pair[0])]) {
      row.insertCell().textContent = cell;
    }
    return row;
  }));
}

// `ourCache` reads our own statistics.
export async function compare(ourCache) {
  const url = new URLSearchParams(location.search).get("base");
  if (!url) return;
  $("base").hidden = false;
  for (;;) {
    try {
      const [base, ours] = await Promise.all([fetchBase(url), ourCache()]);
      show(ours, base);
      $("base-note").textContent = `base: ${url}`;
    } catch (error) {
      $("base-note").textContent = `no comparison with ${url}: ${error.message}`;
    }
    await new Promise((done) => setTimeout(done, MILLISECONDS));
  }
}
