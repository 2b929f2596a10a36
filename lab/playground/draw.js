// What the page draws, again after every change of `state`.

"use strict";

function draw() {
  const own = softmax(state.own.logits);
  const now = softmax(model.forward(state.tokens, state.pathway).logits);
  drawVerdict(own, now);
  if (speaker.bars === "columns") drawColumns(own, now);
  else drawRows(own, now);
  drawPathway(now);
  drawScore(now);
  if (references) {
    drawNeighbours();
    drawLosses();
    drawControls();
  }
}

/** Elements of SVG. */
function drawn(name, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// ----------------------------------------------------------------------------------------- answer

/** What the model says, in a sentence. */
function drawVerdict(own, now) {
  const [said] = largest(now, 1);
  const [before] = largest(own, 1);
  const unmoved = state.pathway === state.own.pathway;
  const who = unmoved ? "The model says" : "Along this pathway it says";
  const answer = element("b", {}, speaker.name(said));
  const parts = [`${who} `, answer, ` (${percent(now[said])})`];
  if (!unmoved) parts.push(`, by itself ${speaker.name(before)}`);
  parts.push(". ");
  const { label } = state;
  if (label !== null) {
    const right = said === label;
    const mark = element("span", { class: right ? "right" : "wrong" });
    mark.textContent = right ? `✓ ${speaker.praise}` : `✗ ${speaker.wanted(label, now[label])}`;
    parts.push(mark);
  }
  at("verdict").replaceChildren(...parts);
}

/** The answers side by side: an outline for the routers' own pathway, a filled bar for this one. */
function drawColumns(own, now) {
  const tokens = speaker.shown(own, now, state.label);
  const columns = tokens.map((token) => {
    const right = token === state.label;
    const other = !right && token === state.other;
    const note = right ? "right" : other ? "other reading" : "";
    const column = element(
      "div",
      { class: `column ${right ? "is-right" : other ? "is-other" : ""}` },
      element("span", { class: "mark" }, right ? "✓" : other ? "○" : ""),
      element("span", { class: "was", style: `height:${100 * own[token]}%` }),
      element("span", { class: "is", style: `height:${100 * now[token]}%` }),
      element("span", { class: "name" }, speaker.name(token)),
    );
    column.title = `${speaker.name(token)}: ${percent(now[token])}, by the routers ${percent(
      own[token],
    )} ${note}`;
    return column;
  });
  fillAnswers(columns, tokens, now);
}

/** The answers below each other, with words. A click wants a word. */
function drawRows(own, now) {
  const tokens = speaker.shown(own, now, state.label);
  const rows = tokens.map((token) => {
    const row = element(
      "button",
      { class: `answer ${token === state.label ? "is-right" : ""}`, "data-token": token },
      element("span", { class: "name" }, speaker.name(token)),
      element(
        "span",
        { class: "track" },
        element("span", { class: "was", style: `width:${100 * own[token]}%` }),
        element("span", { class: "is", style: `width:${100 * now[token]}%` }),
      ),
      element("span", { class: "number" }, percent(now[token])),
    );
    row.setAttribute("aria-pressed", token === state.label);
    row.onclick = () => want(token);
    return row;
  });
  fillAnswers(rows, tokens, now);
}

function fillAnswers(nodes, tokens, now) {
  const box = at("answers");
  const focused = document.activeElement?.dataset.token;
  box.className = speaker.bars;
  box.replaceChildren(...nodes);
  if (focused) box.querySelector(`[data-token="${focused}"]`)?.focus();
  const best = largest(tokens.map((token) => now[token]), 3).map((i) => tokens[i]);
  const said = best.map((token) => `${speaker.name(token)} ${percent(now[token])}`);
  box.setAttribute("aria-label", `Most probable ${speaker.thing}: ${said.join(", ")}`);
}

/** Of a text: the word that the reader wants to be next. */
function want(token) {
  state.label = token === state.label ? null : token;
  follow(state.label === null ? "neighbours" : state.guide);
}

// ---------------------------------------------------------------------------------------- pathway

/** The squares, made once: the last layer on top, and room for links between layers. */
function buildPathway() {
  const links = (r) => drawn("svg", { id: `links-${r}`, class: "links", "aria-hidden": "true",
    viewBox: `0 0 ${E} 1`, preserveAspectRatio: "none" });
  const rows = places.map((place, r) => {
    const cells = element("div", { class: "cells", style: `--experts:${E}` });
    for (let e = 0; e < E; e++) {
      const cell = element("div", { id: `cell-${r}-${e}`, class: "cell", role: "slider",
        tabindex: r === 0 && e === 0 ? 0 : -1, "aria-orientation": "vertical",
        "aria-valuemin": 0, "aria-valuemax": 100, "aria-label": `${place}, expert ${e}` },
        element("i"), element("span"));
      listen(cell, r, e);
      cells.append(cell);
    }
    return element("div", { class: "row" }, element("span", { class: "place" }, place), cells);
  });
  const parts = [links(0)];
  rows.forEach((row, r) => parts.push(row, links(r + 1)));
  at("pathway").replaceChildren(...parts.reverse());
  at("figure").classList.toggle("tall", places.length > 5 || speaker.bars === "rows");
}

function drawPathway(now) {
  const visited = state.pathway.map((row) => model.select(row));
  state.pathway.forEach((row, r) =>
    row.forEach((share, e) => {
      const cell = cellAt(r, e);
      const visits = visited[r].includes(e);
      cell.classList.toggle("visited", visits);
      cell.style.setProperty("--share", Math.sqrt(share));
      cell.style.setProperty("--own", Math.sqrt(state.own.pathway[r][e]));
      cell.lastChild.textContent = share < 0.005 ? "" : Math.round(100 * share);
      cell.setAttribute("aria-valuenow", Math.round(100 * share));
      cell.setAttribute("aria-valuetext", `${percent(share)}${visits ? ", visited" : ""}`);
    }),
  );

  // Links: from the last token up to the experts that it visits, and on to the answer.
  const chips = speaker.chips(state.tokens);
  const [said] = largest(now, 1);
  const from = [{ x: E * (1 - 0.5 / chips.length), share: 0.3 }];
  const to = [{ x: speaker.bars === "columns" ? (E * (said + 0.5)) / speaker.numbers : E / 2,
    share: 0.3 }];
  const layers = visited.map((experts, r) =>
    experts.map((e) => ({ x: e + 0.5, share: state.pathway[r][e] })),
  );
  const stops = [from, ...layers, to];
  stops.slice(1).forEach((above, r) => drawLinks(at(`links-${r}`), stops[r], above));
  at("tokens").replaceChildren(...chips.map((chip) => element("span", {}, chip)));
}

function drawLinks(svg, below, above) {
  const paths = below.flatMap((low) =>
    above.map((high) =>
      drawn("path", {
        d: `M${low.x},1 C${low.x},.4 ${high.x},.6 ${high.x},0`,
        "stroke-width": 0.5 + 14 * Math.sqrt(low.share * high.share) ** 1.5,
        "vector-effect": "non-scaling-stroke",
      }),
    ),
  );
  svg.replaceChildren(...paths);
}

// ------------------------------------------------------------------------------------- neighbours

function drawNeighbours() {
  const items = state.near.places.map((i, neighbour) => {
    const [tokens, label] = [references.prompts[i], references.labels[i]];
    const [was, is] = [state.nearBefore[neighbour], answered(i, state.pathway)];
    return element(
      "li",
      {},
      element("span", { class: "words" }, speaker.say(tokens), " → ",
        element("b", {}, speaker.name(label))),
      element("span", { class: "track" },
        element("span", { class: "was", style: `width:${100 * was}%` }),
        element("span", { class: "is", style: `width:${100 * is}%` })),
      element("span", { class: "number" }, `${percent(was)} → ${percent(is)}`),
    );
  });
  at("neighbours").replaceChildren(...items);
}

/** The loss of every pathway so far, as a line. */
function drawLosses() {
  const [width, height, left, top] = [360, 110, 34, 12];
  const { line } = state;
  const high = Math.max(...line, 0.5);
  const last = Math.max(line.length - 1, settings.steps);
  const x = (i) => left + (i * (width - left - 12)) / last;
  const y = (loss) => top + (height - top - 22) * (1 - loss / high);
  const points = line.map((loss, i) => `${x(i).toFixed(1)},${y(loss).toFixed(1)}`);
  const text = (words, x, y, anchor = "middle") =>
    drawn("text", { x, y, "text-anchor": anchor }, words);
  const dots = line.map((loss, i) =>
    drawn("circle", { cx: x(i), cy: y(loss), r: i === state.kept ? 6 : 3,
      class: i === state.kept ? "kept" : "" }),
  );
  const svg = drawn(
    "svg",
    { viewBox: `0 0 ${width} ${height}` },
    drawn("line", { x1: left, x2: width - 12, y1: y(0), y2: y(0) }),
    text(high.toFixed(1), left - 6, y(high) + 4, "end"),
    text("0", left - 6, y(0) + 4, "end"),
    ...[0, last].map((i) => text(i === 0 ? "the routers' own" : `step ${i}`, x(i), height - 4,
      i === 0 ? "start" : "end")),
    drawn("polyline", { points: points.join(" ") }),
    ...dots,
  );
  const whose = ["oracle", "wrong"].includes(state.guide) ? "Loss of that answer" : "Their loss";
  const words = `${whose}: ${line.map((loss) => loss.toFixed(2)).join(", ")}`;
  at("losses").replaceChildren(element("span", { class: "title" }, whose, ", in nats"), svg);
  at("losses").setAttribute("aria-label", words);
}

/** Buttons, the guides' note, and how far a walk is. */
function drawControls() {
  const { guide, line, kept, walk, playing, moved } = state;
  at("step").disabled = kept !== null;
  at("ten").textContent = playing ? "Stop" : guide === "regression" ? "Try ten mixtures" : "Take ten steps";
  const wrong = guide === "wrong" && state.wrong !== undefined;
  at("guide-note").textContent =
    GUIDES[guide].note + (wrong ? ` Here it should say ${speaker.name(state.wrong)}.` : "");
  const losses = `from ${line[0].toFixed(2)} to ${line.at(-1).toFixed(2)}`;
  let words = "";
  if (kept !== null) words = `Done. Step ${kept} is kept: loss ${line[0].toFixed(2)} → ${line[kept].toFixed(2)}.`;
  else if (walk) words = `Step ${line.length - 1}: loss ${losses}.`;
  else if (moved.length > 0) words = `By hand: loss ${losses}.`;
  at("progress").textContent = words;
  for (const input of document.querySelectorAll("#guides input")) {
    input.checked = input.value === guide;
    input.disabled = state.label === null && ["oracle", "wrong"].includes(input.value);
  }
}

/** How many moves it took. */
function drawScore(now) {
  const [said] = largest(now, 1);
  const [before] = largest(state.own.logits, 1);
  const n = state.moved.length;
  const moves = n === 1 ? "1 move" : `${n} moves`;
  let words = `No move yet. The model says ${speaker.name(said)}.`;
  if (state.label === null) words = "First choose the word that you want, in the list of next words.";
  else if (before === state.label) words = "This one was right from the start. Take a new challenge.";
  else if (state.walk) words = "That was a method's work. Go back to the routers' own pathway to play.";
  else if (n > 0 && said === state.label) words = `✓ Mended in ${moves}!`;
  else if (n > 0) words = `${moves} so far; it says ${speaker.name(said)}.`;
  at("score").textContent = words;
}

// ------------------------------------------------------------------------------------------ start

function start() {
  at("lede").innerHTML = speaker.lede(data);
  at("task").innerHTML = speaker.task();
  at("what-pathway").innerHTML = aboutPathway(data);
  at("about").textContent =
    `Made by “python eval.py playground” from the run ${data.name}. Everything above is computed ` +
    `in this page, from the run's own ${data.parameters.toLocaleString("en")} weights.`;
  buildPathway();
  for (const [name, guide] of Object.entries(GUIDES)) {
    const input = element("input", { type: "radio", name: "guide", value: name });
    input.onchange = () => follow(name);
    at("guides").append(element("label", {}, input, " ", guide.name));
  }
  at("neighbourhood").hidden = at("doubt").hidden = !references;
  at("own").onclick = at("again").onclick = reset;
  at("hint").onclick = hint;
  at("step").onclick = () => {
    state.playing = 0;
    step();
  };
  at("ten").onclick = () => (state.playing ? ((state.playing = 0), draw()) : play());
  at("new-challenge").onclick = () => {
    state.guide = "neighbours";
    askWrong();
    at("figure").scrollIntoView({ behavior: calm.matches ? "auto" : "smooth", block: "nearest" });
  };
  speaker.begin(prompts, data);
  hint();
}

start();
