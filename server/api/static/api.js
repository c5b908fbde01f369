// SPDX-License-Identifier: Apache-2.0
// Requests to the server this page came from, with the API key if there is one.

const KEY = "vllm-eigen-key";
let key = sessionStorage.getItem(KEY) || "";

export class Unauthorized extends Error {}

export const hasKey = () => key !== "";

export function setKey(value) {
  key = value;
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

// Paths are relative to the page's folder, so a prefix before /dashboard stays in place.
export async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  const answer = await fetch(path, { ...options, headers, cache: "no-store" });
  if (answer.status === 401) throw new Unauthorized("the server asks for an API key");
  return answer;
}

export async function getJSON(path) {
  const answer = await request(path);
  if (!answer.ok) throw new Error(await problem(answer));
  return answer.json();
}

// What an error answer says, in OpenAI's shape or otherwise.
export async function problem(answer) {
  const body = await answer.json().catch(() => ({}));
  return body?.error?.message || `${answer.status} ${answer.statusText}`;
}

// The data of each server-sent event. EventSource would be shorter, but cannot send a key.
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += value;
      let end;
      while ((end = text.indexOf("\n\n")) >= 0) {
        const lines = text.slice(0, end).split("\n");
        text = text.slice(end + 2);
        const data = lines.filter((line) => line.startsWith("data:"));
        if (data.length) yield data.map((line) => line.slice(5).trim()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
