// The page itself: what is shown, and what the reader does.

"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const { settings, places, config } = data;
const model = new Model(config, readWeights(data.shapes, data.weights));
const speaker =
  data.task === "skills"
    ? new SkillsSpeaker(data.words)
    : new TextSpeaker(data.words, config.context);
const references = data.references && readReferences(data.references);
const prompts = unpackPrompts(data.prompts);

const at = (id) => document.getElementById(id);
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const E = config.n_experts;
const PAUSE = 450; // ms between two steps

/** All that can change. */
const state = {
  tokens: [],
  label: null, // the right answer; of a text, the word that the reader wants
  other: null, // the answer by the cue's other reading
  own: null, // { pathway, logits } of the routers
  pathway: null, // the one that is shown
  near: null, // the neighbours that are shown: { places, weights, usable }
  nearBefore: [], // P(right) of each along the pathway that the routers chose for the prompt
  wrong: null, // a wrong answer, drawn at random
  loss: null, // what the guide minimises, a function of a pathway
  guide: "neighbours",
  walk: null, // a method on its way: a generator of pathways
  line: [], // the loss of every pathway since the routers' own
  kept: null, // the place in `line` of the pathway that a method kept
  moved: [], // names of the experts that the reader moved, one a move
  playing: 0, // the number of the animation that runs, 0: none
};

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

// ----------------------------------------------------------------------------------------- guides
// Whom to follow: each has a method, a generator of pathways, and the loss that the line shows.

const nearLoss = () => neighbourLoss(model, references, state.near);
const towards = (label) => answerLoss(model, state.tokens, label);

const GUIDES = {
  neighbours: {
    name: "its neighbours",
    note: "NGD: the gradient of the neighbours' loss says how much every expert should move.",
    loss: nearLoss,
    method: (loss) => ngd(state.pathway, loss, settings),
  },
  random: {
    name: "random solved questions",
    note: "Their loss falls just as well, but they know nothing about this question.",
    loss: nearLoss,
    method: (loss) => ngd(state.pathway, loss, settings),
  },
  oracle: {
    name: "the right answer itself",
    note: "The oracle: a look at the solution. It shows how much a pathway could do at best.",
    loss: () => towards(state.label),
    method: (loss) => ngd(state.pathway, loss, settings),
  },
  wrong: {
    name: "a wrong answer",
    note: "The oracle's null: can a pathway make the model say anything?",
    loss: () => towards(state.wrong),
    method: (loss) => ngd(state.pathway, loss, settings),
  },
  regression: {
    name: "the neighbours' mean pathway",
    note: "Kernel regression: mix the own pathway with the mean of the neighbours' pathways.",
    loss: nearLoss,
    method: (loss) => kernelRegression(state.pathway, loss, state.near, references),
  },
  mode: {
    name: "the crowd",
    note: "Mode finding: walk to where the pathways of solved questions are dense.",
    loss: nearLoss,
    method: () => modeFinding(state.pathway, state.near, references, settings),
  },
};

/** P(right) of a reference along a pathway. */
function answered(i, pathway) {
  const { prompts, labels, options } = references;
  return Math.exp(-answerLoss(model, prompts[i], labels[i], options?.[i])(pathway).value);
}

/** Choose a guide, and stand at the routers' own pathway again. */
function follow(guide) {
  state.guide = guide;
  if (references) {
    const near = references.near(state.tokens);
    state.near = guide === "random" ? references.random(near) : near;
    state.nearBefore = state.near.places.map((i) => answered(i, state.own.pathway));
    const wrong = [...new Set(references.labels)].filter((label) => label !== state.label);
    state.wrong = wrong[Math.floor(Math.random() * wrong.length)];
  }
  reset();
}

/** The routers' own pathway. */
function reset() {
  state.playing = 0;
  state.walk = null;
  state.kept = null;
  state.moved = [];
  state.loss = references && GUIDES[state.guide].loss();
  state.pathway = state.own.pathway;
  state.line = state.loss ? [state.loss(state.pathway).value] : [];
  draw();
}

/** One step of the guide's method, from where we stand -> whether there may be another. */
function step() {
  state.walk ??= GUIDES[state.guide].method(state.loss);
  const { value, done } = state.walk.next();
  state.pathway = value;
  if (done) {
    const { value: least } = state.loss(value);
    state.kept = state.line.findIndex((loss) => Math.abs(loss - least) < 1e-9);
  } else {
    state.line.push(state.loss(value).value);
  }
  draw();
  return !done;
}

/** All steps, one after the other, from the routers' own pathway. */
async function play() {
  reset();
  const mine = Date.now();
  state.playing = mine;
  if (state.guide === "mode") await prepare(mine);
  while (state.playing === mine && step()) {
    await new Promise((resolve) => setTimeout(resolve, calm.matches ? 0 : PAUSE));
  }
  if (state.playing === mine) {
    state.playing = 0;
    draw();
  }
}

/** The pathways of all references that may help, a few at a time, so that the page stays awake. */
async function prepare(mine) {
  const missing = state.near.usable.filter((i) => !references.pathways.has(i));
  for (let i = 0; i < missing.length && state.playing === mine; i++) {
    references.pathway(missing[i]);
    if (i % 100 === 0) {
      const share = percent(i / missing.length);
      at("progress").textContent = `running the solved questions through the model: ${share}`;
      await new Promise((resolve) => setTimeout(resolve));
    }
  }
}

// ----------------------------------------------------------------------------------------- prompts

/** Ask the model something. */
function ask(tokens, label = null) {
  const truth = speaker.truth(tokens);
  state.tokens = tokens;
  state.label = truth.label ?? label;
  state.other = truth.other;
  state.own = model.forward(tokens);
  at("asked").replaceChildren(...asked(truth));
  follow(state.guide);
}

/** A prompt of the list that the model answers wrong; fewer of them where the list has none. */
function askWrong() {
  const start = Math.floor(Math.random() * prompts.length);
  for (let i = 0; i < prompts.length; i++) {
    const place = (start + i) % prompts.length;
    const [answer] = largest(model.forward(prompts[place]).logits, 1);
    if (answer !== data.labels[place] || i === prompts.length - 1) {
      ask(prompts[place], data.labels[place]);
      return;
    }
  }
}

/** The question in words, and where to choose another one. */
function asked(truth) {
  const words = element("p", { class: "said" }, speaker.say(state.tokens));
  const why = truth.why.map((text, i) => (i === 1 ? element("strong", {}, `${text} `) : text));
  const another = element("button", { id: "another" }, speaker.another);
  another.onclick = askWrong;
  const own = element("details", {}, element("summary", {}, speaker.invitation));
  own.append(speaker.choose(state.tokens, askOwn));
  own.open = at("asked").querySelector("details")?.open ?? speaker.bars === "rows";
  return [words, element("p", { class: "why" }, ...why), element("p", {}, another), own];
}

/** A prompt of the reader's own: the menus or the field stay as they are. */
function askOwn(tokens) {
  const form = at("asked").querySelector("details");
  const place = document.activeElement;
  ask(tokens);
  at("asked").querySelector("details").replaceWith(form);
  place.focus();
}

// --------------------------------------------------------------------------------- moving experts

/** A pathway in which one expert has another share; the others of its row make room. */
function moved(pathway, r, e, share) {
  const row = Float64Array.from(pathway[r]);
  const left = 1 - row[e];
  row.forEach((old, i) => {
    if (i === e) row[i] = share;
    else row[i] = left > 1e-9 ? (old * (1 - share)) / left : (1 - share) / (row.length - 1);
  });
  return pathway.map((each, i) => (i === r ? row : each));
}

/** The reader moves an expert. */
function move(r, e, share) {
  const name = `${r} ${e}`;
  state.playing = 0;
  state.walk = null;
  state.kept = null;
  if (state.moved.at(-1) !== name) {
    state.moved.push(name);
    state.line.push(0);
  }
  state.pathway = moved(state.pathway, r, e, Math.min(Math.max(share, 0), 1));
  if (state.loss) state.line[state.line.length - 1] = state.loss(state.pathway).value;
  draw();
}

/** The one expert that helps the answer most, if it gets 60 % of its row. */
function bestMove() {
  let best = { share: -1 };
  state.pathway.forEach((row, r) =>
    row.forEach((_, e) => {
      const { logits } = model.forward(state.tokens, moved(state.pathway, r, e, 0.6));
      const share = softmax(logits)[state.label];
      if (share > best.share) best = { r, e, share };
    }),
  );
  return best;
}

/** Mark a good move. */
function hint() {
  for (const cell of document.querySelectorAll(".cell.hint")) cell.classList.remove("hint");
  if (state.label === null) {
    at("caption").textContent = "Choose the word that you want: click it in the list above.";
    return;
  }
  const { r, e } = bestMove();
  cellAt(r, e).classList.add("hint");
  at("caption").textContent = `Try ${places[r]}, expert ${e}: drag it up.`;
}

const cellAt = (r, e) => at(`cell-${r}-${e}`);

/** Mouse, touch and keys on one expert. */
function listen(cell, r, e) {
  let from = null; // where a drag began
  cell.onpointerdown = (event) => {
    cell.setPointerCapture(event.pointerId);
    cell.focus({ preventScroll: true });
    from = { y: event.clientY, share: state.pathway[r][e] };
  };
  cell.onpointermove = (event) => {
    if (!from) return;
    cell.classList.remove("hint");
    move(r, e, from.share + (from.y - event.clientY) / 110);
  };
  cell.onpointerup = cell.onpointercancel = () => (from = null);
  cell.onpointerenter = cell.onfocus = () => describe(r, e);
  cell.onkeydown = (event) => {
    const share = state.pathway[r][e];
    const shares = { ArrowUp: share + 0.05, ArrowDown: share - 0.05, Home: 0, End: 1 };
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], PageUp: [1, 0], PageDown: [-1, 0] };
    if (event.key in shares) move(r, e, shares[event.key]);
    else if (event.key in steps) {
      const [up, right] = steps[event.key];
      cellAt(r + up, e + right)?.focus();
    } else return;
    event.preventDefault();
  };
}

/** What is known of an expert, under the figure. */
function describe(r, e) {
  for (const cell of document.querySelectorAll(".cell")) cell.tabIndex = -1;
  cellAt(r, e).tabIndex = 0;
  state.described = [r, e];
  const [share, own] = [state.pathway[r][e], state.own.pathway[r][e]];
  const likes = data.favourites[r][e].filter(([, often]) => often > 0);
  const list = likes.map(([name, often]) => `${name} (${often} %)`).join(", ");
  at("caption").textContent =
    `${places[r]}, expert ${e}: ${percent(share)}, by the routers ${percent(own)}. ` +
    (list ? `It is visited most by ${list}.` : "Nothing visits it.");
}
