// Re-mixing as in remix.py: which solved prompts are like this one, and three ways to follow them.

"use strict";

const TINY = 1e-20;
const COPY = 0.95; // above this cosine two prompts are the same in other words
const VOCABULARY = 2 ** 20; // tokens and terms: larger than any vocabulary

// -------------------------------------------------------------------------------------- likeness

/** The terms of a prompt as numbers: tokens, tokens at their place from the end, or pairs too. */
function terms(kind, tokens) {
  if (kind === "tfidf-places") return tokens.map((t, i) => t + VOCABULARY * (tokens.length - i));
  if (kind === "tfidf") return tokens;
  const pairs = tokens.slice(1).map((next, i) => (tokens[i] + 1) * VOCABULARY + next);
  return [...tokens, ...pairs];
}

/** Term frequency times inverse frequency. */
class Likeness {
  /** corpus: prompts that say how rare a term is. */
  constructor(kind, references, corpus) {
    this.kind = kind;
    this.size = references.length;
    this.corpusSize = corpus.length;

    // In how many prompts of the corpus does a term stand?
    this.inPrompts = new Map();
    for (const tokens of corpus) {
      for (const term of new Set(terms(kind, tokens))) {
        this.inPrompts.set(term, (this.inPrompts.get(term) ?? 0) + 1);
      }
    }

    // Which references have a term, and how much does it weigh there?
    this.index = new Map();
    references.forEach((tokens, reference) => {
      for (const [term, weight] of this.vector(tokens)) {
        if (!this.index.has(term)) this.index.set(term, []);
        this.index.get(term).push([reference, weight]);
      }
    });
  }

  /** A prompt as a unit vector: term -> weight. */
  vector(tokens) {
    const weights = new Map();
    for (const term of terms(this.kind, tokens)) weights.set(term, (weights.get(term) ?? 0) + 1);
    let squares = 0;
    for (const [term, count] of weights) {
      const rare = Math.log((1 + this.corpusSize) / (1 + (this.inPrompts.get(term) ?? 0)));
      weights.set(term, count * (1 + rare));
      squares += (count * (1 + rare)) ** 2;
    }
    for (const [term, weight] of weights) weights.set(term, weight / Math.sqrt(squares));
    return weights;
  }

  /** The cosine of a prompt and every reference. */
  cosines(tokens) {
    const cosines = new Float64Array(this.size);
    for (const [term, weight] of this.vector(tokens)) {
      for (const [reference, other] of this.index.get(term) ?? []) {
        cosines[reference] += weight * other;
      }
    }
    return cosines.map((cosine) => Math.min(cosine, 1));
  }
}

/** How much neighbours at these distances count: a Gaussian, in units of their median distance. */
function gaussian(distances) {
  const sorted = Float64Array.from(distances).sort();
  const median = Math.max(sorted[Math.floor((sorted.length - 1) / 2)], 1e-6);
  const weights = Array.from(distances, (d) => Math.exp(-((d / median) ** 2) / 2) + TINY);
  const total = sum(weights);
  return weights.map((weight) => weight / total);
}

// ------------------------------------------------------------------------------------- references

/** Prompts whose answers are known. */
class References {
  /** data: prompts, labels, correct (1 where the model answers right), options, corpus. */
  constructor(model, data, settings) {
    Object.assign(this, data);
    this.model = model;
    this.settings = settings;
    this.pathways = new Map(); // place of a reference -> the pathway that the model takes for it
    const corpus = data.corpus ?? data.prompts;
    this.likeness = new Likeness(settings.embedding, data.prompts, corpus);
    this.copies = new Likeness("tfidf-bigrams", data.prompts, corpus);
  }

  /** The k usable references nearest to a prompt: places, weights, and all that are usable. */
  near(tokens) {
    const copies = this.copies.cosines(tokens);
    const usable = [];
    this.correct.forEach((right, i) => {
      if (right && copies[i] <= COPY) usable.push(i);
    });
    const cosines = this.likeness.cosines(tokens);
    const nearest = largest(usable.map((i) => cosines[i]), this.settings.k).map((j) => usable[j]);
    const distances = nearest.map((i) => Math.sqrt(2 - 2 * cosines[i]));
    return { places: nearest, weights: gaussian(distances), usable };
  }

  /** The same weights, but references drawn at random. */
  random(near) {
    const left = [...near.usable];
    const draw = () => left.splice(Math.floor(Math.random() * left.length), 1)[0];
    return { ...near, places: near.places.map(draw) };
  }

  pathway(i) {
    if (!this.pathways.has(i)) this.pathways.set(i, this.model.forward(this.prompts[i]).pathway);
    return this.pathways.get(i);
  }

  /** The weighted mean of some references' pathways. */
  meanPathway(places, weights) {
    const mean = this.pathway(places[0]).map((row) => new Float64Array(row.length));
    places.forEach((place, i) =>
      this.pathway(place).forEach((row, r) => accumulate(mean[r], row, weights[i])),
    );
    return mean;
  }
}

// ----------------------------------------------------------------------------------------- losses
// A loss is a function of a pathway -> { value, gradient }, in nats; the gradient is a function.

/** How badly a prompt's label is answered along a pathway; options: the tokens to choose from. */
function answerLoss(model, tokens, label, options = null) {
  return (pathway) => {
    const result = model.forward(tokens, pathway);
    const places = options ?? Array.from(result.logits.keys());
    const shares = softmax(places.map((token) => result.logits[token]));
    const logits = new Float64Array(result.logits.length);
    places.forEach((token, i) => (logits[token] = shares[i] - (token === label)));
    return {
      value: -Math.log(Math.max(shares[places.indexOf(label)], 1e-300)),
      gradient: () => model.gradient(result, logits),
    };
  };
}

/** How badly the neighbours are answered along a pathway: their weighted mean. */
function neighbourLoss(model, references, near) {
  const losses = near.places.map((i) =>
    answerLoss(model, references.prompts[i], references.labels[i], references.options?.[i]),
  );
  return (pathway) => {
    const each = losses.map((loss) => loss(pathway));
    const gradient = () => {
      const rows = pathway.map((row) => new Float64Array(row.length));
      each.forEach((one, i) =>
        one.gradient().forEach((row, r) => accumulate(rows[r], row, near.weights[i])),
      );
      return rows;
    };
    return { value: dot(near.weights, each.map((one) => one.value)), gradient };
  };
}

// --------------------------------------------------------------------------------- three methods
// Each yields the pathways on its way, and returns the one to keep.

/** Shares of any sum -> of sum 1. */
function rescale(row) {
  const total = sum(row);
  return row.map((share) => share / total);
}

/** a + factor * b, row by row. */
function mixed(a, b, factor) {
  return a.map((row, r) => row.map((share, e) => share + factor * (b[r][e] - share)));
}

/** Neighbourhood gradient descent: steps against the gradient of the loss, each a bit shorter. */
function* ngd(start, loss, { steps, lr }) {
  let z = start.map((row) => row.map((share) => Math.log(Math.max(share, TINY))));
  let pathway = start.map(rescale);
  let now = loss(pathway);
  let kept = start;
  let least = now.value;
  for (let step = 0; step < steps; step++) {
    // The gradient in the logits z, where each row of the pathway is softmax(z).
    const gradient = now.gradient().map((row, r) => {
      const mean = dot(pathway[r], row);
      return row.map((slope, e) => pathway[r][e] * (slope - mean));
    });
    const length = Math.max(Math.sqrt(sum(gradient.map((row) => dot(row, row)))), TINY);

    // A step of a given length along it.
    const cosine = 0.5 + 0.5 * Math.cos((Math.PI * step) / steps);
    const rate = (lr * (0.001 + 0.999 * cosine)) / length;
    z = z.map((row, r) => row.map((logit, e) => logit - rate * gradient[r][e]));
    pathway = z.map(softmax);
    now = loss(pathway);
    if (now.value < least) {
      least = now.value;
      kept = pathway;
    }
    yield pathway;
  }
  return kept;
}

/** The neighbours' mean pathway, mixed with the own one: the best of eleven mixtures. */
function* kernelRegression(start, loss, near, references) {
  const mean = references.meanPathway(near.places, near.weights);
  let kept = start;
  let least = loss(start).value;
  for (let tenths = 1; tenths <= 10; tenths++) {
    const pathway = mixed(start, mean, tenths / 10).map(rescale);
    const { value } = loss(pathway);
    if (value < least) {
      least = value;
      kept = pathway;
    }
    yield pathway;
  }
  return kept;
}

/** Mean shift: walk to where the references' pathways are dense. No loss is asked. */
function* modeFinding(start, near, references, { steps, alpha, k }) {
  let pathway = start;
  for (let step = 0; step < steps; step++) {
    const distances = near.usable.map((i) => {
      let squares = 0;
      references.pathway(i).forEach((row, r) => {
        for (let e = 0; e < row.length; e++) squares += (row[e] - pathway[r][e]) ** 2;
      });
      return Math.sqrt(squares);
    });
    const nearest = largest(distances.map((d) => -d), k);
    const weights = gaussian(nearest.map((j) => distances[j]));
    const mean = references.meanPathway(nearest.map((j) => near.usable[j]), weights);
    pathway = mixed(pathway, mean, 1 - alpha).map(rescale);
    yield pathway;
  }
  return pathway;
}

/** Run a method to its end -> the pathway that it keeps. */
function finish(method) {
  for (;;) {
    const { value, done } = method.next();
    if (done) return value;
  }
}
