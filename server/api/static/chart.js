// SPDX-License-Identifier: Apache-2.0
// Charts drawn as SVG: lines over time, and bars per layer.

import { bits, bytes } from "./format.js";

const NAMESPACE = "http://www.w3.org/2000/svg";

function element(name, attributes, text) {
  const node = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

const STEPS = [1, 2, 4, 5, 8, 10, 16, 20, 25, 32, 40, 50, 64, 80, 100, 128, 160, 200, 256, 512];

// A round distance between the four grid lines, in the binary unit that fits.
function gridStep(top) {
  const unit = 1024 ** Math.floor(Math.log(Math.max(top / 4, 1024)) / Math.log(1024));
  return (STEPS.find((step) => step * unit * 4 >= top) ?? 1024) * unit;
}

function path(points) {
  return points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
}

// Splits samples at gaps, so that no line bridges them.
function segments(samples) {
  const parts = [];
  for (const sample of samples) {
    const last = parts.at(-1)?.at(-1);
    if (!last || sample.time - last.time > 5) parts.push([]);
    parts.at(-1).push(sample);
  }
  return parts;
}

// Seconds on the time axis: those of the samples, from one minute up to `most`.
function span(samples, most) {
  return samples.length ? Math.min(most, Math.max(60, samples.at(-1).time - samples[0].time)) : 60;
}

// Bytes in use and their uncompressed equivalent, against the pool, over `most` seconds.
export function drawUse(svg, samples, pool, most) {
  const { width, height } = svg.getBoundingClientRect();
  if (!width) return;
  const left = 62, right = 8, top = 10, bottom = 20;
  const plain = Math.max(0, ...samples.map((sample) => sample.uncompressed_bytes));
  const seconds = span(samples, most);
  const ceiling = 4 * gridStep(Math.max(plain, pool) * 1.05);
  const now = samples.length ? samples.at(-1).time : 0;
  const x = (time) => left + (1 - (now - time) / seconds) * (width - left - right);
  const y = (value) => top + (1 - value / ceiling) * (height - top - bottom);
  const parts = [];
  for (let i = 0; i <= 4; i += 1) {
    const value = (ceiling * i) / 4;
    parts.push(element("line", { class: "grid", x1: left, x2: width - right, y1: y(value),
      y2: y(value) }));
    parts.push(element("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" },
      bytes(value)));
  }
  const gap = seconds > 150 ? 60 : 20;
  for (let back = 0; back <= seconds; back += gap) {
    const anchor = back === 0 ? "end" : "middle";
    const label = gap === 60 ? `−${back / 60} min` : `−${back} s`;
    parts.push(element("text", { x: x(now - back), y: height - 4, "text-anchor": anchor },
      back ? label : "now"));
  }
  for (const segment of segments(samples)) {
    const line = segment.map((sample) => [x(sample.time), y(sample.used_bytes)]);
    const floor = [[line.at(-1)[0], y(0)], [line[0][0], y(0)]];
    parts.push(element("path", { class: "area", d: `${path([...line, ...floor])}Z` }));
    parts.push(element("path", { class: "line plain",
      d: path(segment.map((sample) => [x(sample.time), y(sample.uncompressed_bytes)])) }));
    parts.push(element("path", { class: "line", id: "used-line", d: path(line) }));
  }
  parts.push(element("line", { class: "limit", x1: left, x2: width - right, y1: y(pool),
    y2: y(pool) }));
  parts.push(element("text", { x: left + 4, y: y(pool) - 5 }, "pool"));
  svg.replaceChildren(...parts);
}

// One small line without axes, scaled to its own maximum.
export function drawSpark(svg, samples, value, most) {
  const { width, height } = svg.getBoundingClientRect();
  if (!width || !samples.length) return;
  const seconds = span(samples, most);
  const top = Math.max(1, ...samples.map(value));
  const now = samples.at(-1).time;
  const lines = segments(samples).map((segment) => element("path", { class: "line",
    d: path(segment.map((sample) => [(1 - (now - sample.time) / seconds) * width,
      2 + (1 - value(sample) / top) * (height - 4)])) }));
  svg.replaceChildren(...lines);
}

// Keys and values of every layer side by side: their `rank`, or the mean `bits` of a cached number.
export function drawLayers(svg, layers, what) {
  const parent = svg.parentElement.getBoundingClientRect().width;
  const height = svg.getBoundingClientRect().height || 160;
  if (!parent) return;
  const left = 30, bottom = 18, top = 6;
  const step = Math.min(96, Math.max(16, (parent - left) / layers.length));
  const width = left + step * layers.length;
  svg.style.width = `${width}px`;
  const of = (layer, part) => layer[`${what}_${part}`];
  const ceiling = Math.max(...layers.flatMap((layer) => [of(layer, "k"), of(layer, "v")]));
  const y = (value) => top + (1 - value / ceiling) * (height - top - bottom);
  const parts = [];
  for (const value of [0, ceiling / 2, ceiling]) {
    parts.push(element("line", { class: "grid", x1: left, x2: width, y1: y(value), y2: y(value) }));
    parts.push(element("text", { x: left - 5, y: y(value) + 4, "text-anchor": "end" },
      what === "rank" ? Math.round(value) : bits(Number(value.toFixed(1)))));
  }
  const bar = step * 0.36;
  const every = Math.max(1, Math.ceil(28 / step));
  layers.forEach((layer, index) => {
    const x = left + step * index + step * 0.1;
    for (const [offset, part, name, kind] of [
      [0, "k", "key", "bar"], [bar + 1, "v", "value", "bar value"]]) {
      const value = of(layer, part);
      const node = element("rect", { class: kind, x: x + offset, y: y(value), width: bar, rx: 2,
        height: y(0) - y(value) });
      const text = `layer ${index}: ${name} rank ${layer[`rank_${part}`]}, ` +
        `${bits(layer[`bits_${part}`])} bits`;
      node.append(element("title", {}, text));
      parts.push(node);
    }
    if (index % every === 0) {
      parts.push(element("text", { x: x + bar, y: height - 3, "text-anchor": "middle" }, index));
    }
  });
  svg.replaceChildren(...parts);
}
