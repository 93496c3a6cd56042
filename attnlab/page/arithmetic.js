// attnlab/predict in JavaScript: bytes as BigInt, exact at any size; seconds as numbers. A test holds both together
// over thousands of random configurations.
//
//   B batch   T query tokens   S context   H n_heads   G n_kv_heads   R = H / G   D head_dim   P ranks
//
// A shape is {n_layers, dim, n_heads, n_kv_heads, head_dim, ffn_dim, vocab_size, tied_embeddings}, whole numbers.

const OVERLAP = FACTS.overlap, CALLS_PER_LAYER = FACTS.calls_per_layer, MOST = 2n ** 40n;
const most = (a, b) => (a > b ? a : b);
const upwards = (a, b) => (a + b - 1n) / b;

function divisors(n) {
  const found = [];
  for (let d = 1; d <= n; d++) if (n % d === 0) found.push(d);
  return found;
}

function variantName(heads, groups) {
  return groups === heads ? "MHA" : groups === 1 ? "MQA" : `GQA-${groups}`;
}

function exact(shape) {
  const s = {};
  for (const name of ["n_layers", "dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size"])
    s[name] = BigInt(shape[name]);
  s.tables = shape.tied_embeddings ? 1n : 2n;
  s.table = s.vocab_size * s.dim;
  s.q = s.n_heads * s.head_dim;
  s.kv = s.n_kv_heads * s.head_dim;
  return s;
}

function validRanks(shape) {
  const g = shape.n_kv_heads;
  return divisors(shape.n_heads).filter((p) => g % p === 0 || p % g === 0);
}

// What one of P ranks holds: KV heads are copied once there are more ranks than heads.
function perRank(shape, ranks) {
  return {
    ...shape,
    n_heads: shape.n_heads / ranks,
    n_kv_heads: Math.max(1, Math.floor(shape.n_kv_heads / ranks)),
    ffn_dim: Math.ceil(shape.ffn_dim / ranks),
    vocab_size: Math.ceil(shape.vocab_size / ranks),
  };
}

// --- bytes ----------------------------------------------------------------------------------------------------------

const elementBytes = (dtype) => BigInt(FACTS.element_bytes[dtype]);

function nParams(shape) {
  const s = exact(shape);
  const layer = 2n * s.dim * (s.q + s.kv) + 3n * s.dim * s.ffn_dim + 2n * s.dim;
  return s.table * s.tables + s.n_layers * layer + s.dim;
}

function kvBytesPerToken(shape, dtype) {
  const s = exact(shape);
  return 2n * s.n_layers * s.kv * elementBytes(dtype);
}

function kvCacheBytes(shape, batch, context, dtype, ranks = 1) {
  return BigInt(batch) * BigInt(context) * kvBytesPerToken(perRank(shape, ranks), dtype);
}

function weightBytes(shape, dtype, ranks = 1) {
  return nParams(perRank(shape, ranks)) * elementBytes(dtype);
}

// In one decode step: every weight once, but of an embedding table that is not the head only the rows looked up.
function weightReadBytes(shape, rows, dtype) {
  const s = exact(shape);
  return (nParams(shape) - (s.tables === 1n ? 0n : s.table) + BigInt(rows) * s.dim) * elementBytes(dtype);
}

// The largest set of intermediate tensors alive at once; see attnlab.predict.memory.activation_bytes.
function activationBytes(shape, batch, tokens, dtype) {
  const s = exact(shape), d = s.dim, f = s.ffn_dim, b = BigInt(batch), t = BigInt(tokens), e = elementBytes(dtype);
  const product = s.q + 2n * s.kv, heads = s.q + s.kv;
  const widest = most(most(2n * d + product + 3n * heads, 3n * d + product + heads + s.q), 3n * d + 3n * f + most(f, d));
  return most(t * ((b * widest + 2n * s.head_dim) * e + 8n), b * (t * d + s.vocab_size) * e);
}

function decodePeak(shape, batch, context, dtype, kvDtype, ranks = 1) {
  const weights = weightBytes(shape, dtype, ranks), cache = kvCacheBytes(shape, batch, context, kvDtype, ranks);
  const activations = activationBytes(perRank(shape, ranks), batch, 1, dtype);
  return { weights, cache, activations, total: weights + cache + activations };
}

function maxBatch(shape, capacity, context, dtype, kvDtype, ranks = 1) {
  const weights = weightBytes(shape, dtype, ranks), cache = kvCacheBytes(shape, 1, context, kvDtype, ranks);
  const rank = perRank(shape, ranks);
  let low = 0n, high = weights > capacity ? 0n : (capacity - weights) / cache; // low fits, or nothing does
  if (high > MOST) high = MOST;
  while (low < high) {
    const middle = (low + high + 1n) / 2n;
    if (weights + middle * cache + activationBytes(rank, middle, 1, dtype) <= capacity) low = middle;
    else high = middle - 1n;
  }
  return low;
}

function maxContext(shape, capacity, batch, dtype, kvDtype, ranks = 1) {
  const one = decodePeak(shape, batch, 1, dtype, kvDtype, ranks);
  const free = capacity - (one.total - one.cache), found = free > 0n ? free / one.cache : 0n;
  return found < MOST ? found : MOST;
}

// --- seconds --------------------------------------------------------------------------------------------------------

function attentionBytes(shape, batch, queries, context, dtype) {
  const s = exact(shape), b = BigInt(batch);
  return elementBytes(dtype) * 2n * b * s.head_dim * (s.n_heads * BigInt(queries) + s.n_kv_heads * BigInt(context));
}

function attentionFlops(shape, batch, queries, context) {
  const s = exact(shape), t = BigInt(queries);
  return 4n * BigInt(batch) * s.q * (t * BigInt(context) - (t * (t - 1n)) / 2n);
}

function computeRoof(machine, dtype) {
  const names = machine.device === "cpu" ? [dtype, "float32"] : [dtype];
  return Math.max(...names.map((name) => machine.matmul_rate[name] || 0));
}

// A measured rate at ``size``, between its neighbours by powers; the roof where none was measured.
function rateAt(machine, what, dtype, size) {
  const prefix = `${what} ${dtype} `, known = [];
  for (const [name, rate] of Object.entries(machine.rates || {}))
    if (name.startsWith(prefix)) known.push([Number(name.slice(prefix.length)), rate]);
  if (!known.length) return computeRoof(machine, dtype);
  known.sort((a, b) => a[0] - b[0]);
  const below = known.filter(([at]) => at <= size).pop() || known[0];
  const above = known.find(([at]) => at >= size) || known[known.length - 1];
  if (below[0] === above[0]) return below[1];
  const share = Math.log(size / below[0]) / Math.log(above[0] / below[0]);
  return below[1] ** (1 - share) * above[1] ** share;
}

function ratedHeadDim(headDim) {
  const off = (known) => Math.max(known, headDim) / Math.min(known, headDim);
  return FACTS.rated_head_dims.reduce((best, known) => (off(known) < off(best) ? known : best));
}

// Seconds of one decode step (queries 1) or a prefill: of one layer's attention, or of the whole model.
function predict(shape, machine, batch, queries, context, dtype, scope) {
  const measured = Object.keys(machine.rates || {}).length > 0;
  const together = (a, b) => (measured ? (a ** OVERLAP + b ** OVERLAP) ** (1 / OVERLAP) : Math.max(a, b));
  const moved = Number(attentionBytes(shape, batch, queries, context, dtype));
  const flops = Number(attentionFlops(shape, batch, queries, context));
  const ratio = Math.floor(shape.n_heads / shape.n_kv_heads);
  const kind = queries === 1 ? `decode ${ratedHeadDim(shape.head_dim)}` : "prefill";
  const rate = rateAt(machine, kind, dtype, queries === 1 ? ratio : queries);
  let terms = { bandwidth: moved / machine.read_bandwidth, compute: flops / rate, fixed: machine.call_seconds };
  let seconds = together(terms.bandwidth, terms.compute) + terms.fixed;
  if (scope === "model") {
    const rows = batch * queries, s = exact(shape), layers = shape.n_layers;
    const blocks = Number(nParams(shape) - s.table * s.tables), head = Number(s.table);
    const products = 2 * batch * (queries * blocks + head);
    const weights = Number(weightReadBytes(shape, rows, dtype)) / machine.read_bandwidth;
    terms = {
      weights: together(weights, products / rateAt(machine, "product", dtype, rows)),
      attention: layers * together(terms.bandwidth, terms.compute),
      fixed: (machine.step_seconds || 0) + layers * (machine.layer_seconds || CALLS_PER_LAYER * machine.call_seconds),
    };
    seconds = terms.weights + terms.attention + terms.fixed;
  }
  const binding = Object.keys(terms).reduce((best, name) => (terms[name] > terms[best] ? name : best));
  return { seconds, terms, binding };
}
