// A request that a model understands, made of what its `input:` says.

const FREE = 4; // the size that is filled in where any will do
const NUMBERS_MAX = 2048; // more than that nobody wants to see typed

const ARRAYS = {
  FP32: Float32Array, FP64: Float64Array, INT8: Int8Array, INT16: Int16Array, INT32: Int32Array, INT64: BigInt64Array,
  UINT8: Uint8Array, UINT16: Uint16Array, UINT32: Uint32Array, UINT64: BigUint64Array, BOOL: Uint8Array,
};

const within = (value, low, high) => Math.max(low, high === null ? value : Math.min(value, high));
const sizes = (input) => input.sizes.map(([low, high]) => within(FREE, low, high));
const product = (numbers) => numbers.reduce((a, b) => a * b, 1);
const isWhole = (datatype) => /INT/.test(datatype);

/** How many numbers one request has. */
export function numberCount(inputs) {
  return inputs.reduce((sum, input) => sum + product(sizes(input)), 0);
}

/** Whether it can be shown as text. */
export function fitsText(inputs) {
  return inputs.length > 0 && numberCount(inputs) <= NUMBERS_MAX;
}

const freeCount = (input) => input.shape.filter((each) => each < 0).length;

/** Whether bytes say the sizes, and can be made here: JavaScript has no arrays of the half types. */
export function fitsBytes(inputs) {
  const saysSizes = inputs.length === 1 ? freeCount(inputs[0]) < 2 : inputs.length > 0 && !inputs.some(freeCount);
  return saysSizes && numberCount(inputs) <= 1 << 22 && inputs.every((input) => ARRAYS[input.datatype]);
}

function number({ datatype, values }, isRandom) {
  if (datatype === "BOOL") return isRandom ? Math.random() < 0.5 : false;
  const [low, high] = values || [0, isWhole(datatype) ? 9 : 1];
  if (!isRandom) return within(0, low, high);
  const drawn = low + Math.random() * (high - low + isWhole(datatype));
  return within(isWhole(datatype) ? Math.floor(drawn) : Math.round(drawn * 1000) / 1000, low, high);
}

function nested(shape, input, isRandom) {
  if (!shape.length) return number(input, isRandom);
  return Array.from({ length: shape[0] }, () => nested(shape.slice(1), input, isRandom));
}

/** JSON text of one request: nested lists; an object of them where there are several inputs. */
export function sampleText(inputs, hasNames, isRandom) {
  const values = inputs.map((input) => nested(sizes(input), input, isRandom));
  if (!hasNames) return rows(values[0]);
  return `{\n${inputs.map((input, index) => `  ${JSON.stringify(input.name)}: ${rows(values[index])}`).join(",\n")}\n}`;
}

/** Nested lists with one innermost list a line. */
function rows(value, indent = "") {
  if (!Array.isArray(value) || !value.some(Array.isArray)) return JSON.stringify(value).replaceAll(",", ", ");
  const inner = `${indent}  `;
  return `[\n${value.map((each) => inner + rows(each, inner)).join(",\n")}\n${indent}]`;
}

/** The same as raw bytes, one input after the other. */
export function sampleBytes(inputs) {
  const parts = inputs.map((input) => {
    const values = new ARRAYS[input.datatype](product(sizes(input)));
    const isLong = /64$/.test(input.datatype) && isWhole(input.datatype);
    for (let index = 0; index < values.length; index += 1) {
      const value = number(input, true);
      values[index] = isLong ? BigInt(value) : Number(value);
    }
    return new Uint8Array(values.buffer);
  });
  return new Blob(parts, { type: "application/octet-stream" });
}
