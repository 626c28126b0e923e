// Numbers: out of the page's text, and onto the page.

const decodeBytes = (text) => {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
};

const decodeFloats = (text) => new Float32Array(decodeBytes(text).buffer);

const inflate = async (text) => {
  const stream = new Blob([decodeBytes(text)]).stream();
  const inflated = stream.pipeThrough(new DecompressionStream("deflate"));
  return new Int8Array(await new Response(inflated).arrayBuffer());
};

const clamp = (x, low, high) => Math.min(high, Math.max(low, x));

// Decimals of which the last is no finer than `unit`.
const decimalsFor = (unit) => (unit > 0 ? clamp(Math.floor(-Math.log10(unit) + 1e-9), 0, 12) : 0);

// Decimals that show this many digits of the largest number.
const decimalsOf = (largest, digits) =>
  largest > 0 ? clamp(digits - 1 - Math.floor(Math.log10(largest)), 0, 12) : 0;

const plain = (x, decimals) => {
  const text = Math.abs(x).toFixed(decimals);
  return x < 0 && Number(text) !== 0 ? `\u2212${text}` : text;
};

const signed = (x, decimals) => {
  const text = plain(x, decimals);
  return x > 0 && Number(text) !== 0 ? `+${text}` : text;
};

const brief = (x) => {
  const size = Math.abs(x);
  if (size === 0) return "0";
  const text = size >= 1e-5 && size < 1e4 ? String(Number(size.toPrecision(2))) : size.toExponential(1);
  return (x < 0 ? "\u2212" : "") + text.replace("e-", "e\u2212").replace("e+", "e");
};

const grouped = (n) => n.toLocaleString("en-US");

// An element with attributes and children; strings become text, never markup.
const element = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
};

