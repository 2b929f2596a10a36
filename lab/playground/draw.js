// What the page shows, drawn anew after every change of `state`.

"use strict";

function draw() {
  const own = softmax(state.own.logits);
  const now = softmax(model.forward(state.tokens, state.pathway).logits);
  const [said, before] = [largest(now, 1)[0], largest(own, 1)[0]];
  drawVerdict(now, said, before);
  drawAnswers(own, now);
  drawPathway(said);
  drawScore(said, before);
  if (!references) return;
  drawNeighbours();
  drawLosses();
  drawControls();
}

// ----------------------------------------------------------------------------------------- answer

/** What the model says, in a sentence. */
function drawVerdict(now, said, before) {
  const { label, pathway, own } = state;
  const unmoved = pathway === own.pathway;
  const words = [unmoved ? "The model says " : "Now it says "];
  words.push(element("b", {}, speaker.name(said)), ` (${percent(now[said])})`);
  words.push(unmoved ? ". " : `, by itself ${speaker.name(before)}. `);
  if (label !== null) {
    const right = said === label;
    const text = right ? `✓ ${speaker.praise}` : `✗ ${speaker.wanted(label, now[label])}`;
    words.push(element("span", { class: right ? "right" : "wrong" }, text));
  }
  at("verdict").replaceChildren(...words);
}

/** A bar: an outline for the routers' pathway, filled for this one. */
function bar(side, was, is) {
  const size = (share) => ({ style: `${side}: ${100 * share}%` });
  return [element("i", { class: "was", ...size(was) }), element("i", { class: "is", ...size(is) })];
}

/** All answers side by side, or words below each other; a click wants a word. */
function drawAnswers(own, now) {
  const tokens = speaker.shown(own, now, state.label);
  const focused = document.activeElement?.dataset.token;
  const nodes = tokens.map((token) => {
    const kind = token === state.label ? "is-right" : token === state.other ? "is-other" : "";
    const name = element("span", { class: "name" }, speaker.name(token));
    if (speaker.bars === "columns") {
      const mark = { "is-right": "✓", "is-other": "other" }[kind] ?? "";
      const bars = bar("height", own[token], now[token]);
      const column = element("div", { class: `column ${kind}` }, ...bars, name);
      column.append(element("span", { class: "mark" }, mark));
      column.title = `${percent(now[token])}, by the routers ${percent(own[token])}`;
      return column;
    }
    const track = element("span", { class: "track" }, ...bar("width", own[token], now[token]));
    const number = element("span", { class: "number" }, percent(now[token]));
    const attributes = { class: `answer ${kind}`, "data-token": token, "aria-pressed": !!kind };
    const row = element("button", attributes, name, track, number);
    row.onclick = () => want(token);
    return row;
  });
  at("answers").className = speaker.bars;
  at("answers").setAttribute("role", speaker.bars === "columns" ? "img" : "group");
  at("answers").replaceChildren(...nodes);
  if (focused) document.querySelector(`[data-token="${focused}"]`)?.focus();
  const said = largest(now, 3).map((token) => `${speaker.name(token)} ${percent(now[token])}`);
  at("answers").setAttribute("aria-label", `Most probable ${speaker.things}: ${said.join(", ")}`);
}

// ---------------------------------------------------------------------------------------- pathway

/** An element of SVG. */
function drawn(name, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

/** The squares, made once: the last layer on top, and room for links between the layers. */
function buildPathway() {
  const box = { class: "links", "aria-hidden": true, preserveAspectRatio: "none" };
  const links = (r) => drawn("svg", { ...box, id: `links-${r}`, viewBox: `0 0 ${E} 1` });
  const slider = { class: "cell", role: "slider", "aria-orientation": "vertical" };
  const limits = { tabindex: -1, "aria-valuemin": 0, "aria-valuemax": 100 };
  at("pathway").append(links(0));
  places.forEach((place, r) => {
    const cells = element("div", { class: "cells", style: `--experts: ${E}` });
    for (let e = 0; e < E; e++) {
      const names = { id: `cell-${r}-${e}`, "aria-label": `${place}, expert ${e}` };
      const cell = element("div", { ...slider, ...limits, ...names });
      cell.append(element("i"), element("span"));
      listen(cell, r, e);
      cells.append(cell);
    }
    const row = element("div", { class: "row" }, element("span", { class: "place" }, place), cells);
    at("pathway").prepend(links(r + 1), row);
  });
  cellAt(0, 0).tabIndex = 0;
  at("figure").classList.toggle("tall", places.length > 5 || speaker.bars === "rows");
  at("figure").classList.toggle("many", E > 20);
}

function drawPathway(said) {
  const visited = state.pathway.map((row) => model.select(row));
  state.pathway.forEach((row, r) =>
    row.forEach((share, e) => {
      const cell = cellAt(r, e);
      const visits = visited[r].includes(e);
      const number = Math.round(100 * share);
      cell.classList.toggle("visited", visits);
      cell.style.setProperty("--share", Math.sqrt(share)); // a small share is seen, too
      cell.style.setProperty("--own", Math.sqrt(state.own.pathway[r][e]));
      cell.lastChild.textContent = number || "";
      cell.setAttribute("aria-valuenow", number);
      cell.setAttribute("aria-valuetext", `${number} %${visits ? ", visited" : ""}`);
    }),
  );

  // Links from the last token up to the experts that it visits, and on to the answer.
  const chips = speaker.chips(state.tokens);
  const answer = speaker.bars === "columns" ? (E * (said + 0.5)) / speaker.numbers : E / 2;
  const layers = visited.map((experts, r) =>
    experts.map((e) => ({ x: e + 0.5, share: state.pathway[r][e] })),
  );
  const [start, end] = [E * (1 - 0.5 / chips.length), answer].map((x) => [{ x, share: 0.3 }]);
  [...layers, end].forEach((above, r) => drawLinks(at(`links-${r}`), layers[r - 1] ?? start, above));
  at("tokens").replaceChildren(...chips.map((chip) => element("span", {}, chip)));
}

/** A curve between any two, the thicker the more weight goes that way. */
function drawLinks(svg, below, above) {
  const curves = below.flatMap((low) =>
    above.map((high) => {
      const d = `M${low.x},1 C${low.x},.4 ${high.x},.6 ${high.x},0`;
      const width = 0.5 + 14 * (low.share * high.share) ** 0.75;
      return drawn("path", { d, "stroke-width": width, "vector-effect": "non-scaling-stroke" });
    }),
  );
  svg.replaceChildren(...curves);
}

// ------------------------------------------------------------------------------------- neighbours

function drawNeighbours() {
  const { places, weights } = state.near;
  const items = places.map((i, neighbour) => {
    const [was, is] = [state.nearBefore[neighbour], answered(i, state.pathway)];
    const label = element("b", {}, speaker.name(references.labels[i]));
    const words = element("span", { class: "words" }, speaker.say(references.prompts[i]), ": ");
    words.append(label);
    words.title = `counts ${percent(weights[neighbour])}`;
    const track = element("span", { class: "track" }, ...bar("width", was, is));
    const number = element("span", { class: "number" }, `${percent(was)} → ${percent(is)}`);
    return element("li", {}, words, track, number);
  });
  at("neighbours").replaceChildren(...items);
}

/** The loss of every pathway so far, as a line. */
function drawLosses() {
  const { line, kept, guide, moved } = state;
  const [left, right, top, bottom] = [34, 350, 10, 90];
  const last = Math.max(line.length - 1, settings.steps);
  const high = Math.max(...line, 0.5);
  const x = (i) => left + (i * (right - left)) / last;
  const y = (loss) => bottom - ((bottom - top) * loss) / high;
  const text = (words, x, y, anchor) => drawn("text", { x, y, "text-anchor": anchor }, words);
  const dot = (loss, i) =>
    i === kept
      ? drawn("circle", { cx: x(i), cy: y(loss), r: 6, class: "kept" })
      : drawn("circle", { cx: x(i), cy: y(loss), r: 3 });
  const points = line.map((loss, i) => `${x(i)},${y(loss)}`).join(" ");
  const svg = drawn(
    "svg",
    { viewBox: "0 0 360 108" },
    drawn("line", { x1: left, x2: right, y1: bottom, y2: bottom }),
    text(high.toFixed(1), left - 6, top + 4, "end"),
    text("0", left - 6, bottom + 4, "end"),
    text("routers", left, bottom + 16, "start"),
    text(`${moved.length ? "move" : "step"} ${last}`, right, bottom + 16, "end"),
    drawn("polyline", { points }),
    ...line.map(dot),
  );
  const whose = ["oracle", "wrong"].includes(guide) ? "That answer's loss" : "The neighbours' loss";
  const title = element("span", { class: "note" }, `${whose}, in nats`);
  at("losses").replaceChildren(title, svg);
  const losses = line.map((loss) => loss.toFixed(2)).join(", ");
  at("losses").setAttribute("aria-label", `${whose}: ${losses}`);
}

/** Buttons, the note on the guide, and how far a walk is. */
function drawControls() {
  const { guide, line, kept, walk, playing, label, wrong } = state;
  const losses = (i) => `${line[0].toFixed(2)} → ${line[i].toFixed(2)}`;
  let words = "";
  if (kept !== null) words = `Done. The best pathway is kept, step ${kept}: loss ${losses(kept)}.`;
  else if (walk) words = `Step ${line.length - 1}: loss ${losses(line.length - 1)}.`;
  at("progress").textContent = words;
  at("step").disabled = kept !== null;
  at("ten").textContent = playing ? "Stop" : `Take ${settings.steps} steps`;
  const aim = guide === "wrong" ? ` Here it is to say ${speaker.name(wrong)}.` : "";
  at("guide-note").textContent = GUIDES[guide].note + aim;
  for (const input of document.querySelectorAll("#guides input")) {
    input.checked = input.value === guide;
    input.disabled = label === null && ["oracle", "wrong"].includes(input.value);
  }
}

/** How many moves it took. */
function drawScore(said, before) {
  const { label, walk, moved } = state;
  const moves = moved.length === 1 ? "1 move" : `${moved.length} moves`;
  let words = `No move yet, and it says ${speaker.name(said)}.`;
  if (label === null) words = "First choose the word that you want: click it on top.";
  else if (before === label) words = "This one is right anyway. Take a new challenge.";
  else if (walk) words = "That was not your hand. Start again.";
  else if (moved.length && said === label) words = `✓ Mended in ${moves}!`;
  else if (moved.length) words = `${moves}, and it says ${speaker.name(said)}.`;
  at("score").textContent = words;
}

// ------------------------------------------------------------------------------------------ start

function start() {
  at("lede").innerHTML = speaker.lede(data);
  at("about-task").innerHTML = speaker.task;
  at("about-pathway").innerHTML = aboutPathway(data);
  at("on-average").textContent = data.onAverage ? onAverage(data.onAverage) : "";
  at("another").textContent = speaker.another;
  at("invitation").textContent = speaker.invitation;
  at("about").textContent =
    `Made by “python eval.py playground” from the run ${data.name}. All that you see is computed ` +
    `in this page, from the run's own weights in half precision.`;
  for (const [value, guide] of Object.entries(GUIDES)) {
    const input = element("input", { type: "radio", name: "guide", value });
    input.onchange = () => {
      follow(value);
      play();
    };
    at("guides").append(element("label", {}, input, " ", guide.name));
  }
  at("neighbourhood").hidden = !references;
  at("another").hidden = at("challenge").hidden = prompts.length === 0;
  at("hint").onclick = hint;
  at("own").onclick = at("again").onclick = reset;
  at("another").onclick = askWrong;
  at("step").onclick = () => {
    state.playing = null;
    step();
  };
  at("ten").onclick = () => {
    if (!state.playing) return play();
    state.playing = null;
    draw();
  };
  at("challenge").onclick = () => {
    state.guide = "neighbours";
    askWrong();
  };
  buildPathway();
  speaker.begin();
  hint();
}

start();
