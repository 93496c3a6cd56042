const $ = (id) => document.getElementById(id);
const OWN = "own", WEIGHT_DTYPES = ["bfloat16", "float16", "float32"], CACHE_DTYPES = ["same", ...WEIGHT_DTYPES, "float8", "int8"];
const SIZES = {
  n_layers: ["layers L", 1024], dim: ["width d", 65536], n_heads: ["query heads H", 256], head_dim: ["head size D", 1024],
  ffn_dim: ["FFN width F", 262144], vocab_size: ["vocabulary V", 1048576],
};
const MOST_CONTEXT = 2 ** 24, MOST_BATCH = 2 ** 20, GIB = 2 ** 30;
const START = {
  model: "llama-3-8b", kv_heads: 8, context: 8192, batch: 16, dtype: "bfloat16", kv_dtype: "same", card: "h100", gpus: 1,
};
let state = { ...START }, own = { ...FACTS.models[START.model] };

const shapeNow = () => ({ ...(state.model === OWN ? own : FACTS.models[state.model]), n_kv_heads: state.kv_heads });
const machineOf = (name) => FACTS.cards[name] || FACTS.measured[name].machine;
const cacheDtype = () => (state.kv_dtype === "same" ? state.dtype : state.kv_dtype);

// --- words ----------------------------------------------------------------------------------------------------------

const count = (n) => n.toLocaleString("en-US");
const three = (x) => (x >= 1000 ? count(Math.round(x)) : String(Number(x.toPrecision(3))));
const gib = (bytes) => `${three(Number(bytes) / GIB)} GiB`;
function bytesSaid(bytes) {
  const size = Number(bytes);
  for (const [unit, name] of [[2 ** 40, "TiB"], [GIB, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]])
    if (size >= unit) return `${three(size / unit)} ${name}`;
  return `${size} bytes`;
}
function seconds(s) {
  return s >= 120 ? `${three(s / 60)} min` : s >= 1 ? `${three(s)} s` : s >= 1e-3 ? `${three(s * 1e3)} ms` : `${three(s * 1e6)} µs`;
}
const colour = (variant) =>
  `var(--${{ MHA: "mha", "GQA-16": "gqa16", "GQA-8": "gqa8", "GQA-4": "gqa4", "GQA-2": "gqa2", MQA: "mqa" }[variant] || "other"})`;

// --- drawing --------------------------------------------------------------------------------------------------------

function add(parent, name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

let widths = {}; // read all at once: to ask between two drawings is to lay the page out each time

function measure() {
  for (const id of ["heads", "memory", "time", "quality", "measured"]) widths[id] = Math.max(240, $(id).clientWidth || 320);
}

function canvas(id, height) {
  const svg = $(id), width = widths[id];
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  return [svg, width];
}

let heads = { of: 0, width: 0, at: [], parts: [] }, moving = 0;

function drawHeads(shape) {
  const H = shape.n_heads, R = H / shape.n_kv_heads, variant = variantName(H, shape.n_kv_heads), height = 128;
  const svg = $("heads"), width = widths.heads, step = width / H;
  const radius = Math.min(10, step * 0.42), side = Math.min(22, Math.max(3, step * 0.84 * Math.min(R, 3)));
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  if (heads.of !== H) {
    svg.replaceChildren();
    const lines = add(svg, "g", {}), squares = add(svg, "g", {}), circles = add(svg, "g", {});
    heads = { of: H, width, at: [], parts: [] };
    for (let h = 0; h < H; h++)
      heads.parts.push([add(lines, "line", {}), add(squares, "rect", { rx: 3 }), add(circles, "circle", {})]);
  }
  const wanted = heads.parts.map((_, h) => (Math.floor(h / R) * R + R / 2) * step);
  const place = (at) => {
    heads.at = at;
    heads.parts.forEach(([line, square, circle], h) => {
      const x = (h + 0.5) * step;
      for (const [key, value] of [["x1", x], ["y1", 18], ["x2", at[h]], ["y2", 100]]) line.setAttribute(key, value);
      line.setAttribute("stroke", colour(variant));
      for (const [key, value] of [["x", at[h] - side / 2], ["y", 100 - side / 2], ["width", side], ["height", side]])
        square.setAttribute(key, value);
      square.setAttribute("fill", colour(variant));
      for (const [key, value] of [["cx", x], ["cy", 18], ["r", radius]]) circle.setAttribute(key, value);
      circle.setAttribute("style", "fill:var(--card);stroke:var(--ink)");
    });
  };
  cancelAnimationFrame(moving);
  const from = heads.at, still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (from.length !== H || heads.width !== width || still) place(wanted);
  else {
    const began = performance.now();
    const frame = (now) => {
      const t = Math.min(1, Math.max(0, (now - began) / 250)), part = t * t * (3 - 2 * t);
      place(wanted.map((x, h) => from[h] + (x - from[h]) * part));
      if (t < 1) moving = requestAnimationFrame(frame);
    };
    moving = requestAnimationFrame(frame);
  }
  heads.width = width;
  $("heads-title").textContent = `${variant}: ${H} query heads read ${shape.n_kv_heads} KV head${shape.n_kv_heads > 1 ? "s" : ""}`;
  $("heads-note").textContent =
    `Circles: query heads. Squares: the key/value heads that are stored. ` +
    (R === 1 ? "Each query head has its own." : `Query head h reads KV head h // ${R}, so the cache is 1/${R} of MHA's.`);
}

// Rows of stacked bars on one scale, each [label, [[name, value, colour], …], what to write behind it].
function drawBars(id, rows, mark) {
  const [svg, width] = canvas(id, rows.length * 38 + (mark ? 20 : 4));
  const totals = rows.map(([, parts]) => parts.reduce((sum, [, value]) => sum + value, 0));
  const scale = width / (1.02 * Math.max(...totals, mark ? mark.value : 0));
  rows.forEach(([label, parts, said], index) => {
    const y = index * 38;
    add(svg, "text", { x: 0, y: y + 12 }, label);
    add(svg, "text", { x: width, y: y + 12, "text-anchor": "end", class: "muted" }, said);
    let x = 0;
    for (const [name, value, fill] of parts) {
      const bar = add(svg, "rect", { x, y: y + 17, width: Math.max(0, value * scale), height: 14, style: `fill:${fill}` });
      add(bar, "title", {}, name);
      x += value * scale;
    }
  });
  if (mark) {
    const x = mark.value * scale, bottom = rows.length * 38, left = x > width / 2;
    rows.forEach((_, index) =>
      add(svg, "line", { x1: x, x2: x, y1: index * 38 + 14, y2: index * 38 + 34, stroke: "var(--ink)", "stroke-width": 2 }));
    add(svg, "text", { x: left ? x + 2 : x - 2, y: bottom + 10, "text-anchor": left ? "end" : "start" }, mark.said);
  }
}

function drawMemory(shape, machine) {
  const peaks = [shape, { ...shape, n_kv_heads: shape.n_heads }].map((one) => {
    const ranks = validRanks(one).includes(state.gpus) ? state.gpus : 1;
    return decodePeak(one, state.batch, state.context, state.dtype, cacheDtype(), ranks);
  });
  const [mine, mha] = peaks, H = shape.n_heads, variant = variantName(H, shape.n_kv_heads), whole = shape.n_kv_heads === H;
  const total = kvCacheBytes(shape, state.batch, state.context, cacheDtype()), capacity = BigInt(machine.memory_bytes);
  $("kv-bytes").textContent = bytesSaid(total);
  $("kv-bytes").dataset.bytes = String(total);
  $("kv-bytes").title = `${count(total)} bytes`;
  $("kv-said").textContent =
    `${bytesSaid(kvBytesPerToken(shape, cacheDtype()))} a token × ${count(state.context)} tokens × ${count(state.batch)} sequences` +
    (state.gpus > 1 ? `; on each of ${state.gpus} cards ${bytesSaid(mine.cache)}` : "") + ".";
  const bars = (label, variantOf, peak) => [
    label,
    [["weights", Number(peak.weights), "var(--weights)"], ["KV cache", Number(peak.cache), colour(variantOf)],
     ["activations", Number(peak.activations), "var(--activations)"]],
    gib(peak.total),
  ];
  const rows = [bars(variant, variant, mine), ...(whole ? [] : [bars("as MHA", "MHA", mha)])];
  drawBars("memory", rows, { value: machine.memory_bytes, said: `${machine.name}: ${gib(capacity)}` });
  const most = maxBatch(shape, capacity, state.context, state.dtype, cacheDtype(), state.gpus);
  const longest = maxContext(shape, capacity, state.batch, state.dtype, cacheDtype(), state.gpus);
  const fits = mine.total <= capacity;
  $("memory-note").innerHTML =
    `Grey: weights, ${gib(mine.weights)}; colour: cache; the rest: activations${state.gpus > 1 ? "; all of one card" : ""}. ` +
    (fits ? "<b>It fits.</b> " : `<span class="bad">It does not fit.</span> `) +
    `At this context ${most ? `a batch of ${count(most)} fits` : "not even one sequence fits"}; at this batch ` +
    `${longest ? `a context of ${count(longest)} tokens` : "no token"}.`;
}

function drawTime(shape, machine) {
  const rank = perRank(shape, state.gpus), whole = shape.n_kv_heads === shape.n_heads;
  const predicted = (one, queries) =>
    predict(one, machine, state.batch, queries, state.context, state.dtype, "model");
  const step = predicted(rank, 1), prompt = predicted(rank, state.context);
  const words = { weights: "reading the weights", attention: "reading keys and values", fixed: "starting each call" };
  $("step").textContent = seconds(step.seconds);
  $("step-said").textContent =
    `${count(state.batch)} sequences at once: ${three(state.batch / step.seconds)} tokens per second. Most of it is ${words[step.binding]}.`;
  const bars = (label, variant, one) => [
    label,
    [["weights", one.terms.weights, "var(--weights)"], ["attention", one.terms.attention, colour(variant)], ["fixed", one.terms.fixed, "var(--activations)"]],
    seconds(one.seconds),
  ];
  const variant = variantName(shape.n_heads, shape.n_kv_heads), mha = { ...shape, n_kv_heads: shape.n_heads };
  const rows = [bars(variant, variant, step)];
  if (!whole && validRanks(mha).includes(state.gpus)) rows.push(bars("as MHA", "MHA", predicted(perRank(mha, state.gpus), 1)));
  drawBars("time", rows);
  const source = machine.source === "measured" ? "roofs measured there" : `${machine.source}, which no kernel reaches`;
  $("time-note").textContent =
    `Grey: weights; colour: attention; the rest: calls. A prompt of ${count(state.context)} tokens in each sequence would take ` +
    `${seconds(prompt.seconds)} first. Roofs of ${machine.name}: ${source}` +
    (state.gpus > 1 ? "; what the cards tell each other is not counted" : "") +
    (state.kv_dtype !== "same" ? "; a cache of another dtype is taken to be read as the weights' is" : "") + ".";
}

function drawQuality(shape) {
  const found = FACTS.quality, R = shape.n_heads / shape.n_kv_heads;
  if (!found) {
    canvas("quality", 8);
    $("quality-note").textContent = "No finished sweep is published yet.";
    return;
  }
  const [svg, width] = canvas("quality", found.arms.length * 26 + 34), left = 120, plot = width - left - 8;
  const reach = 1.1 * Math.max(...found.arms.map(([, , , mean, half]) => Math.abs(mean) + half));
  const x = (value) => left + (plot / 2) * (1 + value / reach), bottom = found.arms.length * 26;
  add(svg, "line", { x1: x(0), x2: x(0), y1: 0, y2: bottom, stroke: "var(--ink)" });
  found.arms.forEach(([ratio, arm, , mean, half, smallest], index) => {
    const y = index * 26 + 13, variant = variantName(found.n_heads, found.n_heads / ratio), here = ratio === R;
    const look = `stroke:${colour(variant)};opacity:${here || R === 1 ? 1 : 0.45}`, wide = Math.min(smallest, reach);
    add(svg, "rect", { x: x(-wide), y: y - 8, width: x(wide) - x(-wide), height: 16, style: "fill:var(--grid)" });
    add(svg, "text", { x: 0, y: y + 4, "font-weight": here ? 700 : 400 }, `R = ${ratio}, ${arm}`);
    add(svg, "line", { x1: x(mean - half), x2: x(mean + half), y1: y, y2: y, style: look, "stroke-width": 2 });
    const dot = add(svg, "circle", { cx: x(mean), cy: y, r: 5, style: `${look};stroke-width:2;fill:${arm === "plain" ? colour(variant) : "var(--card)"}` });
    add(dot, "title", {}, `${mean} ± ${half}`);
  });
  for (const value of [-reach / 1.1, 0, reach / 1.1])
    add(svg, "text", { x: x(value), y: bottom + 14, "text-anchor": "middle", class: "muted" }, value ? value.toFixed(3) : "0");
  add(svg, "text", { x: width, y: bottom + 30, "text-anchor": "end", class: "muted" }, "bits per byte above MHA; right is worse");
  const mine = found.arms.filter(([ratio]) => ratio === R);
  $("quality-note").innerHTML =
    (R === 1 ? "MHA is what the others are compared with. "
      : mine.length ? mine.map(([, arm, n, mean, half, , said]) =>
        `<b>R = ${R}, ${arm}: ${mean > 0 ? "+" : ""}${mean.toFixed(4)} ± ${half.toFixed(4)}</b> (${n} seeds): ${said}. `).join("")
      : `<b>R = ${R} was not trained.</b> `) +
    `95 % intervals, paired by seed; grey: too small to be seen. Models of ${three(found.n_params / 1e6)} M parameters with ${found.n_heads} heads, ` +
    `${three(found.tokens / 1e6)} M tokens: what it says of larger models is open. Rows: ${found.run}.`;
}

function drawMeasured(shape) {
  const name = FACTS.measured[state.card] ? state.card : FACTS.measured[FACTS.headline] ? FACTS.headline : Object.keys(FACTS.measured)[0];
  const there = FACTS.measured[name];
  if (!there) {
    canvas("measured", 8);
    $("measured-note").textContent = "No machine's rows are published yet.";
    return;
  }
  const dtypes = [...new Set(there.points.map(([dtype]) => dtype))];
  const dtype = dtypes.includes(state.dtype) ? state.dtype : dtypes[0];
  const near = (index, wanted, points) => points.reduce((best, point) =>
    Math.abs(Math.log(point[index] / wanted)) < Math.abs(Math.log(best / wanted)) ? point[index] : best, points[0][index]);
  let points = there.points.filter((point) => point[0] === dtype);
  const batch = near(4, state.batch, points);
  points = points.filter((point) => point[4] === batch);
  const context = near(5, state.context, points);
  points = points.filter((point) => point[5] === context).sort((a, b) => b[2] - a[2]);
  const [, H, , D] = points[0], R = shape.n_heads / shape.n_kv_heads;
  const line = points.map((point) => predict(
    { n_layers: 1, dim: 1, n_heads: H, n_kv_heads: point[2], head_dim: D, ffn_dim: 1, vocab_size: 1, tied_embeddings: false },
    there.machine, batch, 1, context, dtype, "layer").seconds);
  const [svg, width] = canvas("measured", 210), left = 64, bottom = 168;
  const all = [...points.flatMap((point) => point.slice(6)), ...line], low = Math.log(Math.min(...all) / 1.4), high = Math.log(Math.max(...all) * 1.4);
  const y = (value) => bottom - ((Math.log(value) - low) / (high - low)) * (bottom - 12);
  const x = (index) => left + ((index + 0.5) * (width - left - 30)) / points.length;
  for (let power = Math.ceil(low / Math.LN10 - 1); power <= high / Math.LN10; power++)
    for (const digit of [1, 2, 5]) {
      const value = digit * 10 ** power;
      if (Math.log(value) < low || Math.log(value) > high) continue;
      add(svg, "line", { x1: left, x2: width, y1: y(value), y2: y(value), stroke: "var(--grid)" });
      add(svg, "text", { x: left - 6, y: y(value) + 4, "text-anchor": "end", class: "muted" }, seconds(value));
    }
  add(svg, "polyline", { points: line.map((value, index) => `${x(index)},${y(value)}`).join(" "), fill: "none", stroke: "var(--muted)", "stroke-width": 2, "stroke-dasharray": "6 4" });
  add(svg, "text", { x: x(0) + 10, y: y(line[0]) - 8, class: "muted" }, "predicted");
  points.forEach((point, index) => {
    const [, , g, , , , q25, median, q75] = point, variant = variantName(H, g);
    add(svg, "line", { x1: x(index), x2: x(index), y1: y(q25), y2: y(q75), stroke: colour(variant), "stroke-width": 2 });
    const dot = add(svg, "circle", { cx: x(index), cy: y(median), r: H / g === R ? 8 : 5, style: `fill:${colour(variant)}` });
    add(dot, "title", {}, `${variant}: ${seconds(median)}`);
    add(svg, "text", { x: x(index), y: y(median) + (line[index] > median ? 24 : -12), "text-anchor": "middle", "font-weight": H / g === R ? 700 : 400 },
      width < 480 ? seconds(median).split(" ")[0] : seconds(median));
    add(svg, "text", { x: x(index), y: bottom + 18, "text-anchor": "middle" }, variant);
    add(svg, "text", { x: x(index), y: bottom + 34, "text-anchor": "middle", class: "muted" }, `R = ${H / g}`);
  });
  $("measured-note").textContent =
    `Attention of one layer in one decode step, H = ${H}, D = ${D}, ${dtype}, the measured context and batch nearest to yours: ` +
    `${count(context)} and ${count(batch)}. Dots: medians; bars: quartiles; dashed: predicted from the machine's own roofs. ` +
    `${name} (${there.processor})${name === state.card ? "" : ", which is not the card you chose"}. Rows: ${there.run}.`;
}

function drawEvery(shape, machine) {
  const table = $("every"), capacity = BigInt(machine.memory_bytes);
  const titles = ["variant", "KV per token", "KV cache", "largest batch", "longest context", "decode step", "tokens/s", "tokens/s at the largest batch"];
  const focused = table.contains(document.activeElement);
  table.replaceChildren();
  const header = table.createTHead().insertRow();
  for (const title of titles) {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = title;
    header.append(cell);
  }
  const body = table.createTBody();
  for (const g of divisors(shape.n_heads).reverse()) {
    const one = { ...shape, n_kv_heads: g }, ranks = validRanks(one).includes(state.gpus) ? state.gpus : 0;
    const row = body.insertRow(), button = document.createElement("button");
    button.type = "button";
    button.textContent = variantName(shape.n_heads, g);
    button.style.color = colour(button.textContent);
    button.setAttribute("aria-label", `choose ${button.textContent}`);
    button.addEventListener("click", () => change({ kv_heads: g }));
    row.insertCell().append(button);
    if (g === shape.n_kv_heads) row.setAttribute("aria-current", "true");
    const cells = [bytesSaid(kvBytesPerToken(one, cacheDtype()))];
    if (ranks) {
      const rank = perRank(one, ranks), batch = maxBatch(one, capacity, state.context, state.dtype, cacheDtype(), ranks);
      const speed = (b) => b / predict(rank, machine, b, 1, state.context, state.dtype, "model").seconds;
      cells.push(
        bytesSaid(kvCacheBytes(one, state.batch, state.context, cacheDtype())),
        count(batch),
        count(maxContext(one, capacity, state.batch, state.dtype, cacheDtype(), ranks)),
        seconds(state.batch / speed(state.batch)),
        three(speed(state.batch)),
        batch ? three(speed(Number(batch))) : "–",
      );
    } else cells.push(`not on ${state.gpus} cards`, ...Array(5).fill(""));
    for (const cell of cells) row.insertCell().textContent = cell;
    if (focused && g === shape.n_kv_heads) button.focus();
  }
  $("every-note").textContent =
    `Times predicted, batch ${count(state.batch)} and context ${count(state.context)} unless a column says otherwise. Choose a variant by its name.`;
}

// --- state, controls and the address --------------------------------------------------------------------------------

const nearest = (valid, wanted) => valid.reduce((best, one) => (Math.abs(one - wanted) < Math.abs(best - wanted) ? one : best));

function settle(wanted) {
  const said = [], next = { ...state, ...wanted };
  if (next.model !== OWN && !FACTS.models[next.model]) {
    said.push(`no published model is called ${next.model}`);
    next.model = state.model;
  }
  const shape = next.model === OWN ? own : FACTS.models[next.model];
  if (wanted.model !== undefined && wanted.kv_heads === undefined) next.kv_heads = shape.n_kv_heads;
  const whole = (name, least, highest) => {
    const value = Math.round(Number(next[name]));
    if (!Number.isFinite(value) || value < least || value > highest) said.push(`${name} must lie in ${least} to ${count(highest)}`);
    next[name] = Number.isFinite(value) ? Math.min(highest, Math.max(least, value)) : state[name];
  };
  whole("kv_heads", 1, shape.n_heads);
  whole("context", 1, MOST_CONTEXT);
  whole("batch", 1, MOST_BATCH);
  whole("gpus", 1, 1024);
  if (shape.n_heads % next.kv_heads) said.push(`${next.kv_heads} does not divide ${shape.n_heads} query heads`);
  next.kv_heads = nearest(divisors(shape.n_heads), next.kv_heads);
  for (const [name, valid] of [["dtype", WEIGHT_DTYPES], ["kv_dtype", CACHE_DTYPES]]) {
    next[name] = FACTS.dtype_aliases[next[name]] || next[name];
    if (!valid.includes(next[name])) {
      said.push(`no ${name} is called ${next[name]}`);
      next[name] = START[name];
    }
  }
  if (!FACTS.cards[next.card] && !FACTS.measured[next.card]) {
    said.push(`no card is called ${next.card}`);
    next.card = START.card;
  }
  const ranks = validRanks({ ...shape, n_kv_heads: next.kv_heads });
  if (!ranks.includes(next.gpus)) {
    if (wanted.gpus !== undefined) said.push(`${next.gpus} cards do not fit ${shape.n_heads} query and ${next.kv_heads} KV heads`);
    next.gpus = ranks.filter((p) => p <= next.gpus).pop() || 1;
  }
  state = next;
  $("copied").textContent = said.join("; ");
}

function read() {
  const found = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  if (found.model === OWN) {
    for (const [name, [, highest]] of Object.entries(SIZES)) {
      const value = Number(found[name]);
      if (Number.isInteger(value) && value >= 1 && value <= highest) own[name] = value;
    }
    own.tied_embeddings = found.tied_embeddings === "true";
    own.n_kv_heads = own.n_heads;
  }
  const known = Object.keys(START).filter((name) => name in found);
  state = { ...START };
  settle(Object.fromEntries(known.map((name) => [name, /^(kv_heads|context|batch|gpus)$/.test(name) ? Number(found[name]) : found[name]])));
}

let telling = 0;
function tell() {
  clearTimeout(telling);
  telling = setTimeout(() => history.replaceState(null, "", address()), 150);
}

function address() {
  const said = new URLSearchParams(state);
  if (state.model === OWN) for (const name of [...Object.keys(SIZES), "tied_embeddings"]) said.set(name, own[name]);
  return `#${said}`;
}

function options(select, names, chosen, titles = {}) {
  select.replaceChildren(...names.map((name) => new Option(titles[name] || name, name, false, String(name) === String(chosen))));
}

function show() {
  measure();
  const shape = shapeNow(), machine = machineOf(state.card), groups = divisors(shape.n_heads), slider = $("kv_heads");
  const variant = variantName(shape.n_heads, state.kv_heads);
  $("model").value = state.model;
  $("own").hidden = state.model !== OWN;
  for (const name of Object.keys(SIZES)) if (document.activeElement !== $(name)) $(name).value = own[name];
  $("tied_embeddings").checked = own.tied_embeddings;
  slider.max = groups.length - 1;
  slider.value = groups.indexOf(state.kv_heads);
  slider.setAttribute("aria-valuetext", `${state.kv_heads}, ${variant}`);
  $("kv_heads-said").textContent = `${state.kv_heads}, ${variant}`;
  for (const name of ["context", "batch"]) {
    $(name).value = Math.log2(state[name]);
    $(name).setAttribute("aria-valuetext", count(state[name]));
    if (document.activeElement !== $(`${name}-exact`)) $(`${name}-exact`).value = state[name];
  }
  $("context-said").textContent = shape.max_context && state.context > shape.max_context ? `trained: ${count(shape.max_context)}` : "tokens";
  $("batch-said").textContent = state.batch > 1 ? "sequences" : "sequence";
  for (const name of ["dtype", "kv_dtype", "card"]) $(name).value = state[name];
  options($("gpus"), validRanks(shape).filter((p) => p <= 64 || p === state.gpus), state.gpus);
  drawHeads(shape);
  drawMemory(shape, machine);
  drawTime(shape, machine);
  drawQuality(shape);
  drawMeasured(shape);
  drawEvery(shape, machine);
}

let waiting = 0;
function later() {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(show);
}

function change(wanted) {
  settle(wanted);
  later();
  tell();
}

function begin() {
  options($("model"), [...Object.keys(FACTS.models), OWN], state.model, { own: "your own shape …" });
  options($("dtype"), WEIGHT_DTYPES, state.dtype);
  options($("kv_dtype"), CACHE_DTYPES, state.kv_dtype, { same: "as the weights" });
  for (const [label, names] of [["datasheets", Object.keys(FACTS.cards)], ["measured", Object.keys(FACTS.measured)]]) {
    const group = document.createElement("optgroup");
    group.label = label;
    group.append(...names.map((name) => new Option(name, name)));
    if (names.length) $("card").append(group);
  }
  for (const [name, [label, highest]] of Object.entries(SIZES)) {
    const field = document.createElement("label"), input = document.createElement("input");
    Object.assign(input, { type: "number", id: name, min: 1, max: highest, step: 1 });
    field.append(label, input);
    $("own").append(field);
    input.addEventListener("input", () => {
      if (!input.value || !input.checkValidity()) return;
      own[name] = Number(input.value);
      change({ kv_heads: nearest(divisors(own.n_heads), state.kv_heads) });
    });
  }
  const tied = document.createElement("label"), box = document.createElement("input");
  Object.assign(box, { type: "checkbox", id: "tied_embeddings" });
  tied.append("tied embeddings", box);
  $("own").append(tied);
  box.addEventListener("change", () => { own.tied_embeddings = box.checked; change({}); });
  for (const name of ["model", "dtype", "kv_dtype", "card"]) $(name).addEventListener("change", () => change({ [name]: $(name).value }));
  $("gpus").addEventListener("change", () => change({ gpus: Number($("gpus").value) }));
  $("kv_heads").addEventListener("input", () => change({ kv_heads: divisors(shapeNow().n_heads)[$("kv_heads").value] }));
  for (const name of ["context", "batch"]) {
    $(name).addEventListener("input", () => change({ [name]: Math.round(2 ** $(name).value) }));
    const exactly = $(`${name}-exact`);
    exactly.addEventListener("input", () => { if (exactly.value && exactly.checkValidity()) change({ [name]: Number(exactly.value) }); });
    exactly.addEventListener("blur", later);
  }
  $("reset").addEventListener("click", () => { state = { ...START }; change({}); });
  $("share").addEventListener("click", async () => {
    history.replaceState(null, "", address());
    try {
      await navigator.clipboard.writeText(location.href);
      $("copied").textContent = "copied";
    } catch {
      $("copied").textContent = "the address bar holds it";
    }
  });
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", () => { read(); later(); });
  addEventListener("resize", later);
  $("sources").textContent =
    "Bytes are counted from shapes, exactly; seconds are predicted from roofs and say which. One GiB is 2^30 bytes. " +
    "Nothing on this page asks a network.";
  read();
  show();
}
begin();
