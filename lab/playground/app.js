// What the reader does: ask, move experts, follow neighbours.

"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const { settings, places, config } = data;
const E = config.n_experts;
const PAUSE = 450; // milliseconds between two steps
const calm = matchMedia("(prefers-reduced-motion: reduce)");

const at = (id) => document.getElementById(id);
const cellAt = (r, e) => at(`cell-${r}-${e}`);

const model = new Model(config, readWeights(data.shapes, data.weights));
const prompts = unpackPrompts(data.prompts);
const Speaker = { skills: SkillsSpeaker, composition: CompositionSpeaker }[data.task] ?? TextSpeaker;
const speaker = new Speaker(data.words, config.context);
const references = data.references && readReferences(data.references);

function readReferences({ prompts, labels, correct, options, corpus }) {
  const solved = {
    prompts: unpackPrompts(prompts),
    labels: Array.from(unpack(labels)),
    correct: Array.from(unpack(correct)),
    options,
    corpus: corpus && unpackPrompts(corpus),
  };
  return new References(model, solved, settings);
}

/** All that can change. */
const state = {
  tokens: [], // the prompt
  label: null, // the right answer; of a text, the word that the reader wants
  other: null, // the answer by the cue's other meaning
  wrong: null, // a wrong answer, drawn at random
  own: null, // the routers' pathway, and the logits along it
  pathway: null, // the one that is shown
  near: null, // the neighbours that are shown: { places, weights, usable }
  nearLoss: null, // their loss, a function of a pathway
  nearBefore: [], // P(right) of each along the routers' pathway
  guide: "neighbours", // what is followed
  loss: null, // the guide's loss
  line: [], // that loss of every pathway since the routers' own
  walk: null, // a method on its way: a generator of pathways
  kept: null, // the place in `line` of the pathway that a method kept
  moved: [], // the experts that the reader moved, one a move
  playing: null, // the animation that runs
};

// ---------------------------------------------------------------------------------------- asking

/** Ask the model something. The form stays as it is while the reader works in it. */
function ask(tokens, label = null, keepForm = false) {
  const truth = speaker.truth(tokens);
  state.tokens = tokens;
  state.label = truth.label ?? label;
  state.other = truth.other;
  state.own = model.forward(tokens);
  at("said").textContent = speaker.question(tokens);
  at("why").textContent = truth.why;
  const askOwn = (own) => ask(own, null, true);
  if (!keepForm) at("form").replaceChildren(speaker.form(tokens, askOwn));
  follow(state.guide);
}

/** Ask a prompt of the list that the model answers wrong, if there is one. */
function askWrong() {
  const start = Math.floor(Math.random() * prompts.length);
  const turned = prompts.map((_, i) => (start + i) % prompts.length);
  const said = (place) => largest(model.forward(prompts[place]).logits, 1)[0];
  const place = turned.find((place) => said(place) !== data.labels[place]) ?? start;
  ask(prompts[place], data.labels[place]);
}

/** Of a text: the word that the reader wants to be next. */
function want(token) {
  state.label = token === state.label ? null : token;
  follow("neighbours");
}

// --------------------------------------------------------------------------------- moving experts

/** A pathway in which one expert has another share; the others of its row make room. */
function moved(pathway, r, e, share) {
  const row = pathway[r];
  const left = 1 - row[e];
  const other = (old) => (left > 1e-9 ? (old * (1 - share)) / left : (1 - share) / (E - 1));
  const changed = row.map((old, i) => (i === e ? share : other(old)));
  return pathway.map((each, i) => (i === r ? changed : each));
}

/** The reader moves an expert. Going on with the same expert is the same move. */
function move(r, e, share) {
  const name = `${r} ${e}`;
  if (state.moved.at(-1) !== name || state.walk) {
    state.moved.push(name);
    state.line.push(0);
  }
  state.playing = state.walk = state.kept = null;
  state.pathway = moved(state.pathway, r, e, Math.min(Math.max(share, 0), 1));
  if (state.loss) state.line[state.line.length - 1] = state.loss(state.pathway).value;
  draw();
}

/** The expert that helps a label most, if it gets 60 % of its row. */
function bestMove(tokens, label, pathway) {
  const moves = pathway.flatMap((row, r) =>
    Array.from(row, (_, e) => ({ r, e, pathway: moved(pathway, r, e, 0.6) })),
  );
  const shares = moves.map((each) => softmax(model.forward(tokens, each.pathway).logits)[label]);
  return moves[largest(shares, 1)[0]];
}

/** Mark a good move. */
function hint() {
  forget();
  if (state.label === null) {
    at("caption").textContent = "First choose the word that you want: click it on top.";
    return;
  }
  const { r, e } = bestMove(state.tokens, state.label, state.pathway);
  cellAt(r, e).classList.add("hint");
  at("caption").textContent = `Drag up ${places[r]}, expert ${e}, which has an arrow.`;
}

function forget() {
  const cell = document.querySelector(".hint");
  if (!cell) return;
  cell.classList.remove("hint");
  at("caption").textContent = "";
}

/** Mouse, touch and keys on one expert. */
function listen(cell, r, e) {
  let from = null; // where a drag began
  cell.onpointerdown = (event) => {
    cell.setPointerCapture(event.pointerId);
    cell.focus({ preventScroll: true });
    from = { y: event.clientY, share: state.pathway[r][e] };
  };
  cell.onpointermove = (event) => {
    if (from && event.clientY !== from.y) {
      forget();
      move(r, e, from.share + (from.y - event.clientY) / 110);
      describe(r, e);
    }
  };
  cell.onpointerup = cell.onpointercancel = () => (from = null);
  cell.onpointerenter = cell.onfocus = () => describe(r, e);
  cell.onkeydown = (event) => {
    const share = state.pathway[r][e];
    const shares = { ArrowUp: share + 0.05, ArrowDown: share - 0.05, Home: 0, End: 1 };
    const ways = { ArrowLeft: [0, -1], ArrowRight: [0, 1], PageUp: [1, 0], PageDown: [-1, 0] };
    if (event.key in shares) move(r, e, shares[event.key]);
    else if (event.key in ways) cellAt(r + ways[event.key][0], e + ways[event.key][1])?.focus();
    else return;
    event.preventDefault();
  };
}

/** What is known of an expert, under the figure. It is the one that Tab leads to. */
function describe(r, e) {
  document.querySelector(".cell[tabindex='0']").tabIndex = -1;
  cellAt(r, e).tabIndex = 0;
  const shares = [state.pathway, state.own.pathway].map((pathway) => percent(pathway[r][e]));
  const likes = data.favourites[r][e].filter(([, often]) => often > 0);
  const list = likes.map(([name, often]) => `${name} (${often} %)`).join(", ");
  const favourites = list ? `Its favourites: ${list}.` : "Nothing goes there.";
  at("caption").textContent =
    `${places[r]}, expert ${e}: ${shares[0]}, by the router ${shares[1]}. ${favourites}`;
}

// --------------------------------------------------------------------------- following something

const descent = (loss) => ngd(state.pathway, loss, settings);
const nearLoss = () => state.nearLoss;

/** What can be followed: its loss, and a method, which is a generator of pathways. */
const GUIDES = {
  neighbours: {
    name: "its neighbours (NGD)",
    note: "The slope of the neighbours' loss says how much each expert should move.",
    loss: nearLoss,
    method: descent,
  },
  random: {
    name: "random solved questions",
    note: "The control: their loss falls as well, but they know nothing about this question.",
    loss: nearLoss,
    method: descent,
  },
  regression: {
    name: "the neighbours' mean pathway (kernel regression)",
    note: "The own pathway, mixed with the mean of the pathways that the neighbours take.",
    loss: nearLoss,
    method: (loss) => kernelRegression(state.pathway, loss, state.near, references),
  },
  crowd: {
    name: "where most pathways are (mode finding)",
    note: "A walk to where the pathways of solved questions are dense. No loss is asked.",
    loss: nearLoss,
    method: () => modeFinding(state.pathway, state.near, references, settings),
  },
  oracle: {
    name: "the right answer (the oracle)",
    note: "A look at the solution: so much could a pathway do at best.",
    loss: () => answerLoss(model, state.tokens, state.label),
    method: descent,
  },
  wrong: {
    name: "a wrong answer, drawn at random",
    note: "Ten steps towards a wrong answer: can a pathway make the model say anything?",
    loss: () => answerLoss(model, state.tokens, state.wrong),
    method: descent,
  },
};

/** P(right) of a reference along a pathway. */
function answered(i, pathway) {
  const { prompts, labels, options } = references;
  return Math.exp(-answerLoss(model, prompts[i], labels[i], options?.[i])(pathway).value);
}

/** Follow something from now on, from the routers' pathway. */
function follow(guide) {
  state.guide = guide;
  if (references) {
    const near = references.near(state.tokens);
    state.near = guide === "random" ? references.random(near) : near;
    state.nearLoss = neighbourLoss(model, references, state.near);
    state.nearBefore = state.near.places.map((i) => answered(i, state.own.pathway));
    const wrong = [...new Set(references.labels)].filter((label) => label !== state.label);
    state.wrong = wrong[Math.floor(Math.random() * wrong.length)];
    state.loss = GUIDES[guide].loss();
  }
  reset();
}

/** Back to the routers' own pathway. */
function reset() {
  state.playing = state.walk = state.kept = null;
  state.moved = [];
  state.pathway = state.own.pathway;
  state.line = state.loss ? [state.loss(state.pathway).value] : [];
  forget();
  draw();
}

/** One step, from where we stand -> whether there may be another one. */
function step() {
  state.walk ??= GUIDES[state.guide].method(state.loss);
  const { value: pathway, done } = state.walk.next();
  const { value: loss } = state.loss(pathway);
  state.pathway = pathway;
  if (done) state.kept = state.line.findIndex((each) => Math.abs(each - loss) < 1e-9);
  else state.line.push(loss);
  draw();
  return !done;
}

/** All steps, one after the other, from the routers' pathway. */
async function play() {
  reset();
  const mine = {};
  state.playing = mine;
  if (state.guide === "crowd") await prepare(mine);
  while (state.playing === mine && step()) {
    await new Promise((resolve) => setTimeout(resolve, calm.matches ? 0 : PAUSE));
  }
  if (state.playing === mine) {
    state.playing = null;
    draw();
  }
}

/** The pathways of all references that may help, a few at a time, so that the page stays awake. */
async function prepare(mine) {
  const missing = state.near.usable.filter((i) => !references.pathways.has(i));
  for (let i = 0; i < missing.length && state.playing === mine; i++) {
    references.pathway(missing[i]);
    if (i % 50 === 0) {
      const share = percent(i / missing.length);
      at("progress").textContent = `Looking at the pathways of solved questions: ${share}`;
      await new Promise((resolve) => setTimeout(resolve));
    }
  }
}
