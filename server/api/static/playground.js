// SPDX-License-Identifier: Apache-2.0
// A small chat with the served model. Models without a chat template get a plain completion.

import { Unauthorized, events, problem, request } from "./api.js";

const $ = (id) => document.getElementById(id);
const messages = [];
let chat = true;
let running = null;

function bubble(role, text = "") {
  const item = document.createElement("li");
  item.className = role;
  item.textContent = text;
  $("talk").append(item);
  item.scrollIntoView({ block: "nearest" });
  return item;
}

async function post(path, body, signal) {
  return request(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
}

// Starts the streamed answer: as a chat, or as a completion where there is no chat template.
async function ask(model, text, signal) {
  const options = {
    model,
    stream: true,
    max_tokens: Number($("max-tokens").value) || 128,
    temperature: Number($("temperature").value),
    stream_options: { include_usage: true },
  };
  if (chat) {
    const answer = await post("v1/chat/completions", { ...options, messages }, signal);
    if (answer.ok) return answer;
    const reason = await problem(answer);
    if (!/chat template/i.test(reason)) throw new Error(reason);
    chat = false;
  }
  const answer = await post("v1/completions", { ...options, prompt: text }, signal);
  if (!answer.ok) throw new Error(await problem(answer));
  return answer;
}

async function send(model, needKey) {
  const text = $("message").value;
  if (!text.trim()) return;
  const began = performance.now();
  running = new AbortController();
  $("send").textContent = "Stop";
  $("play-note").textContent = "";
  bubble("user", text);
  messages.push({ role: "user", content: text });
  const item = bubble("assistant");
  let usage = null;
  try {
    const answer = await ask(model, text, running.signal);
    $("message").value = "";
    for await (const data of events(answer)) {
      if (data === "[DONE]") break;
      const part = JSON.parse(data);
      if (part.error) throw new Error(part.error.message);
      usage = part.usage || usage;
      const choice = part.choices?.[0];
      const piece = choice?.delta ? choice.delta.content : choice?.text;
      if (piece) item.append(piece);
      item.scrollIntoView({ block: "nearest" });
    }
    note(usage, began);
  } catch (error) {
    if (error.name === "AbortError") $("play-note").textContent = "Stopped.";
    else {
      $("play-note").textContent = error.message;
      messages.pop();
      if (!item.textContent) item.remove();
      if (error instanceof Unauthorized) needKey();
    }
  } finally {
    if (item.isConnected) messages.push({ role: "assistant", content: item.textContent });
    running = null;
    $("send").textContent = "Send";
  }
}

function note(usage, began) {
  const seconds = (performance.now() - began) / 1000;
  const tokens = usage ? `${usage.completion_tokens} tokens in ` : "";
  const kind = chat ? "" : " The model has no chat template, so this continues your text.";
  $("play-note").textContent = `${tokens}${seconds.toFixed(1)} s.${kind}`;
}

export function setUp(model, needKey) {
  $("play").addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) running.abort();
    else send(model(), needKey);
  });
  $("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("play").requestSubmit();
    }
  });
  $("clear").addEventListener("click", () => {
    running?.abort();
    messages.length = 0;
    $("talk").replaceChildren();
    $("play-note").textContent = "";
    $("message").focus();
  });
}
