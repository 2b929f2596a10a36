// The model of moe.py, one token at a time: what it answers along a pathway, and how the answer's
// loss changes with every share of that pathway.
//
// A pathway is a list of rows, one for each router; a row has a share for each expert, of sum 1.
// Letters: D width of the model, C width of a head, F width of an expert, E experts.

"use strict";

// ------------------------------------------------------------------------------ numbers in a page

/** Base64 -> Uint16Array. */
function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Uint16Array(bytes.buffer);
}

/** Half-precision numbers -> Float32Array. */
function fromHalf(halves) {
  const powers = Array.from({ length: 32 }, (_, e) => 2 ** (Math.max(e, 1) - 25));
  return Float32Array.from(halves, (half) => {
    const exponent = (half >> 10) & 31;
    const fraction = (half & 1023) + (exponent ? 1024 : 0);
    return (half >> 15 ? -fraction : fraction) * powers[exponent];
  });
}

/** All weights of a run: name -> { data, shape }. */
function readWeights(shapes, packed) {
  const numbers = fromHalf(unpack(packed));
  const weights = new Map();
  let start = 0;
  for (const [name, shape] of Object.entries(shapes)) {
    const size = shape.reduce((product, n) => product * n, 1);
    weights.set(name, { data: numbers.subarray(start, start + size), shape });
    start += size;
  }
  return weights;
}

// ---------------------------------------------------------------------------------- small algebra

const add = (x, y) => x.map((value, i) => value + y[i]);
const sum = (x) => x.reduce((total, value) => total + value, 0);
const dot = (x, y) => x.reduce((total, value, i) => total + value * y[i], 0);

/** Add factor * y to x, in place. */
function accumulate(x, y, factor = 1) {
  for (let i = 0; i < x.length; i++) x[i] += factor * y[i];
}

/** M x, for a matrix of rows in one array. */
function multiply(matrix, x) {
  const { data, shape } = matrix;
  const [rows, columns] = shape;
  const y = new Float64Array(rows);
  for (let i = 0, at = 0; i < rows; i++) {
    let total = 0;
    for (let j = 0; j < columns; j++, at++) total += data[at] * x[j];
    y[i] = total;
  }
  return y;
}

/** The transposed M times g: how a gradient goes back through `multiply`. */
function multiplyBack(matrix, g) {
  const { data, shape } = matrix;
  const [rows, columns] = shape;
  const y = new Float64Array(columns);
  for (let i = 0, at = 0; i < rows; i++) {
    const factor = g[i];
    for (let j = 0; j < columns; j++, at++) y[j] += data[at] * factor;
  }
  return y;
}

/** Scores -> shares of sum 1. */
function softmax(scores) {
  const largest = Math.max(...scores);
  const powers = Float64Array.from(scores, (score) => Math.exp(score - largest));
  const total = sum(powers);
  return powers.map((power) => power / total);
}

/** RMSNorm of pieces of x, each as long as the gain: the whole of x, or one head. */
function normalise(x, gain, epsilon) {
  const y = new Float64Array(x.length);
  const size = gain.length;
  for (let start = 0; start < x.length; start += size) {
    const piece = x.subarray(start, start + size);
    const scale = 1 / Math.sqrt(dot(piece, piece) / size + epsilon);
    for (let i = 0; i < size; i++) y[start + i] = piece[i] * scale * gain[i];
  }
  return y;
}

/** The gradient in x of `normalise`. */
function normaliseBack(x, gain, epsilon, g) {
  const y = new Float64Array(x.length);
  const size = gain.length;
  for (let start = 0; start < x.length; start += size) {
    const piece = x.subarray(start, start + size);
    const scale = 1 / Math.sqrt(dot(piece, piece) / size + epsilon);
    let along = 0;
    for (let i = 0; i < size; i++) along += g[start + i] * gain[i] * piece[i];
    const pull = (along * scale ** 3) / size;
    for (let i = 0; i < size; i++) y[start + i] = g[start + i] * gain[i] * scale - pull * piece[i];
  }
  return y;
}

/** The places of the largest values, largest first. */
function largest(values, count) {
  const places = Array.from(values.keys());
  return places.sort((i, j) => values[j] - values[i]).slice(0, count);
}

// -------------------------------------------------------------------------------------- one expert

/** down(silu(gate) * up): the result, and what the gradient needs. */
function expert(net, x) {
  const z = multiply(net.gateUp, x); // gate and up
  const F = z.length / 2;
  const hidden = new Float64Array(F);
  for (let i = 0; i < F; i++) hidden[i] = (z[i] / (1 + Math.exp(-z[i]))) * z[F + i];
  return { net, z, y: multiply(net.down, hidden) };
}

/** The gradient in x of `expert`. */
function expertBack({ net, z }, g) {
  const F = z.length / 2;
  const inside = multiplyBack(net.down, g);
  const gz = new Float64Array(2 * F);
  for (let i = 0; i < F; i++) {
    const sigmoid = 1 / (1 + Math.exp(-z[i]));
    const silu = z[i] * sigmoid;
    gz[i] = inside[i] * z[F + i] * (sigmoid + silu * (1 - sigmoid));
    gz[F + i] = inside[i] * silu;
  }
  return multiplyBack(net.gateUp, gz);
}

// --------------------------------------------------------------------------------------- the model

class Model {
  /** config: the fields of MoEConfig. weights: name -> { data, shape }. */
  constructor(config, weights) {
    this.config = config;
    this.scale = 1 / Math.sqrt(config.head_dim);
    this.embedding = weights.get("embedding.weight");
    this.unembedding = weights.get("unembedding.weight") ?? this.embedding;
    this.gain = weights.get("norm.weight").data;
    this.blocks = Array.from({ length: config.n_layers }, (_, layer) =>
      this.readBlock(weights, `blocks.${layer}`),
    );
    this.nothing = this.blocks.map(() => ({ keys: [], values: [] }));
    this.remembered = new Map();
  }

  /** A block: attention, then feed-forward sub-layers, of which each may have two layers. */
  readBlock(weights, block) {
    const matrix = (name) => weights.get(`${block}.${name}.weight`);
    const sublayers = [];
    for (let i = 0; matrix(`ffn_norms.${i}`); i++) {
      const sides = [`ffns.${i}`, `ffns.${i}.A`, `ffns.${i}.B`]; // A + B: parallel layers
      const layers = sides.map((side) => this.readLayer(weights, `${block}.${side}`));
      sublayers.push({ gain: matrix(`ffn_norms.${i}`).data, layers: layers.filter(Boolean) });
    }
    return {
      gain: matrix("attention_norm").data,
      q: matrix("attention.q"),
      k: matrix("attention.k"),
      v: matrix("attention.v"),
      o: matrix("attention.o"),
      qGain: matrix("attention.q_norm")?.data,
      kGain: matrix("attention.k_norm")?.data,
      sublayers,
    };
  }

  /** A MoE layer, or a dense one, whose only network every token visits. Or nothing. */
  readLayer(weights, name) {
    const network = (start) => {
      const gateUp = weights.get(`${start}.gate_up.weight`);
      return gateUp && { gateUp, down: weights.get(`${start}.down.weight`) };
    };
    const router = weights.get(`${name}.router.weight`);
    if (!router) return network(name) && { experts: [], shared: network(name) };
    const slice = (tensor, e) => {
      const [, rows, columns] = tensor.shape;
      const size = rows * columns;
      return { data: tensor.data.subarray(e * size, (e + 1) * size), shape: [rows, columns] };
    };
    const gateUp = weights.get(`${name}.experts.gate_up`);
    const down = weights.get(`${name}.experts.down`);
    const experts = Array.from({ length: gateUp.shape[0] }, (_, e) => ({
      gateUp: slice(gateUp, e),
      down: slice(down, e),
    }));
    return { router, experts, shared: network(`${name}.shared`) };
  }

  /** Tokens -> { logits, pathway, tape } at the last one, along a pathway or the routers' own. */
  forward(tokens, pathway = null) {
    return this.step(tokens.at(-1), this.remember(tokens.slice(0, -1)), pathway);
  }

  /** What attention remembers of tokens, for each layer: no pathway of a later token changes it. */
  remember(tokens) {
    if (tokens.length === 0) return this.nothing;
    const name = tokens.join(" ");
    if (!this.remembered.has(name)) {
      const past = this.remember(tokens.slice(0, -1));
      const { tape } = this.step(tokens.at(-1), past, null);
      if (this.remembered.size > 5000) this.remembered.clear();
      this.remembered.set(
        name,
        tape.map(({ attention }) => ({ keys: attention.keys, values: attention.values })),
      );
    }
    return this.remembered.get(name);
  }

  /** One token through all layers. The tape holds what `gradient` needs. */
  step(token, past, pathway) {
    const D = this.config.d_model;
    const scale = this.config.embedding_scale ?? 1; // pages of earlier versions do not say it
    const embedding = this.embedding.data.subarray(token * D, (token + 1) * D);
    let x = Float64Array.from(embedding, (each) => scale * each);
    const tape = [];
    const rows = [];
    this.blocks.forEach((block, layer) => {
      const attention = this.attend(block, x, past[layer]);
      x = add(x, attention.y);
      const sublayers = block.sublayers.map((sublayer) => {
        const normed = normalise(x, sublayer.gain, this.config.norm_eps);
        const visits = sublayer.layers.map((each) => this.visit(each, normed, rows, pathway));
        const entry = { x, sublayer, visits };
        for (const visit of visits) x = add(x, visit.y);
        return entry;
      });
      tape.push({ block, attention, sublayers });
    });
    const normed = normalise(x, this.gain, this.config.norm_eps);
    return { logits: multiply(this.unembedding, normed), pathway: rows, tape, x };
  }

  /** Attention of one token to itself and to those before it. */
  attend(block, x, past) {
    const { n_heads: heads, n_kv_heads: groups, head_dim: C, norm_eps: epsilon } = this.config;
    const normed = normalise(x, block.gain, epsilon);
    const [rawQ, rawK, v] = [block.q, block.k, block.v].map((matrix) => multiply(matrix, normed));
    const position = past.keys.length;
    const q = this.rotate(block.qGain ? normalise(rawQ, block.qGain, epsilon) : rawQ, position);
    const k = this.rotate(block.kGain ? normalise(rawK, block.kGain, epsilon) : rawK, position);
    const keys = [...past.keys, k];
    const values = [...past.values, v];

    // Each head looks at the keys of its group, and takes a mean of the values.
    const shares = [];
    const mean = new Float64Array(heads * C);
    for (let head = 0; head < heads; head++) {
      const own = q.subarray(head * C, (head + 1) * C);
      const start = Math.floor((head * groups) / heads) * C;
      const scores = keys.map((key) => this.scale * dot(own, key.subarray(start, start + C)));
      shares.push(softmax(scores));
      const target = mean.subarray(head * C, (head + 1) * C);
      shares[head].forEach((share, t) =>
        accumulate(target, values[t].subarray(start, start + C), share),
      );
    }
    return { x, rawQ, rawK, q, keys, values, shares, position, y: multiply(block.o, mean) };
  }

  /** Rotary positions: turn the pairs (x[c], x[c + C/2]) of each head; sign -1 turns them back. */
  rotate(x, position, sign = 1) {
    const { head_dim: C, rope_theta: theta } = this.config;
    const half = C / 2;
    const y = new Float64Array(x.length);
    for (let c = 0; c < half; c++) {
      const angle = sign * position * theta ** (-c / half);
      const [cosine, sine] = [Math.cos(angle), Math.sin(angle)];
      for (let i = c; i < x.length; i += C) {
        y[i] = x[i] * cosine - x[i + half] * sine;
        y[i + half] = x[i + half] * cosine + x[i] * sine;
      }
    }
    return y;
  }

  /** One MoE layer. Its row of the pathway joins `rows`. */
  visit(layer, x, rows, pathway) {
    const y = new Float64Array(x.length);
    const visits = [];
    const shared = layer.shared && expert(layer.shared, x);
    if (shared) accumulate(y, shared.y);
    let place = null; // of a dense layer
    if (layer.router) {
      place = rows.length;
      const row = pathway ? pathway[place] : softmax(multiply(layer.router, x));
      rows.push(row);
      const chosen = this.select(row);
      const total = this.config.norm_topk ? sum(chosen.map((e) => row[e])) : 1;
      for (const e of chosen) {
        const visit = { e, weight: row[e] / total, total, ...expert(layer.experts[e], x) };
        accumulate(y, visit.y, visit.weight);
        visits.push(visit);
      }
    }
    return { y, place, visits, shared };
  }

  /** The experts that a token with this row visits, largest share first. */
  select(row) {
    const { top_k: k, n_experts: E, router, top_p: p } = this.config;
    if (router !== "top_p") return largest(row, k);
    let before = 0; // what better experts reach together
    return largest(row, E).filter((e) => {
      const used = before < p;
      before += row[e];
      return used;
    });
  }

  /** A gradient in the logits of `forward`'s result -> the gradient in its pathway. */
  gradient({ tape, x, pathway }, logits) {
    const epsilon = this.config.norm_eps;
    const rows = pathway.map((row) => new Float64Array(row.length));
    let g = normaliseBack(x, this.gain, epsilon, multiplyBack(this.unembedding, logits));
    for (const { block, attention, sublayers } of tape.toReversed()) {
      for (const { x: entering, sublayer, visits } of sublayers.toReversed()) {
        const inside = new Float64Array(g.length);
        for (const visit of visits) accumulate(inside, this.visitBack(visit, g, rows));
        g = add(g, normaliseBack(entering, sublayer.gain, epsilon, inside));
      }
      if (block !== this.blocks[0]) g = add(g, this.attendBack(block, attention, g));
    }
    return rows;
  }

  /** The gradient of `visit`: in x, and in its row of the pathway. */
  visitBack({ place, visits, shared }, g, rows) {
    const inside = shared ? expertBack(shared, g) : new Float64Array(g.length);
    const along = visits.map((visit) => dot(g, visit.y)); // what more weight would change
    const mean = this.config.norm_topk ? dot(along, visits.map((visit) => visit.weight)) : 0;
    visits.forEach((visit, i) => {
      rows[place][visit.e] += (along[i] - mean) / visit.total;
      accumulate(inside, expertBack(visit, g), visit.weight);
    });
    return inside;
  }

  /** The gradient in x of `attend`. Keys and values of earlier tokens are fixed. */
  attendBack(block, { x, rawQ, rawK, q, keys, values, shares, position }, g) {
    const { n_heads: heads, n_kv_heads: groups, head_dim: C, norm_eps: epsilon } = this.config;
    const inside = multiplyBack(block.o, g);
    const gq = new Float64Array(heads * C);
    const gk = new Float64Array(groups * C);
    const gv = new Float64Array(groups * C);
    const last = keys.length - 1;
    for (let head = 0; head < heads; head++) {
      const start = Math.floor((head * groups) / heads) * C;
      const piece = (vector) => vector.subarray(start, start + C); // of the head's group
      const [from, to] = [head * C, (head + 1) * C];
      const gMean = inside.subarray(from, to);
      const gShares = values.map((value) => dot(gMean, piece(value)));
      const mean = dot(shares[head], gShares);
      shares[head].forEach((share, t) => {
        const gScore = this.scale * share * (gShares[t] - mean);
        accumulate(gq.subarray(from, to), piece(keys[t]), gScore);
        if (t === last) accumulate(piece(gk), q.subarray(from, to), gScore);
      });
      accumulate(piece(gv), gMean, shares[head][last]);
    }

    // Back through positions, QK-norm, and the three matrices.
    let back = [this.rotate(gq, position, -1), this.rotate(gk, position, -1)];
    if (block.qGain) back[0] = normaliseBack(rawQ, block.qGain, epsilon, back[0]);
    if (block.kGain) back[1] = normaliseBack(rawK, block.kGain, epsilon, back[1]);
    const total = multiplyBack(block.v, gv);
    accumulate(total, multiplyBack(block.q, back[0]));
    accumulate(total, multiplyBack(block.k, back[1]));
    return normaliseBack(x, block.gain, epsilon, total);
  }
}
