// SPDX-License-Identifier: Apache-2.0
// Numbers as people read them.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const count = (value) => whole.format(value);

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (Math.abs(value) >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit ? value.toFixed(1) : value} ${units[unit]}`;
}

export const percent = (value) => `${(100 * value).toFixed(1)} %`;

export const rate = (value) => (value < 10 ? value.toFixed(1) : whole.format(value));

export const times = (value) => (value < 100 ? value.toFixed(1) : whole.format(value));

export const bits = (value) => String(Number(value.toFixed(2)));
