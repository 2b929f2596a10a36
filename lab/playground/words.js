// Prompts and answers in words: a speaker for each kind of task.

"use strict";

/** An HTML element with attributes and children. */
function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const percent = (share) => `${Math.round(100 * share)} %`;

/** Prompts one behind the other -> lists of tokens. */
function unpackPrompts({ lengths, tokens }) {
  const all = Array.from(unpack(tokens));
  let start = 0;
  return Array.from(unpack(lengths), (length) => all.slice(start, (start += length)));
}

/** What a pathway is. */
function aboutPathway({ config, places }) {
  const some = config.router === "top_p" ? "best" : `${config.top_k} best`;
  const two = places.length > config.n_layers ? " (its blocks have two, A and B)" : "";
  return `Each row is a layer of the model${two}, each square an <b>expert</b>, a small network of
    its own. A <b>router</b> gives every expert of its row a share of 100&nbsp;%. What is asked goes
    through the ${some} in each row (framed); all others rest. The choice in all rows is its
    <b>pathway</b>, from the bottom to the answer on top.`;
}

/** What NGD does to all prompts: those that are asked first are those that it helps most. */
function onAverage({ prompts, before, after }) {
  return `The first questions here are chosen: NGD helps them most. Of all ${prompts} the model
    answers ${percent(before)} right by itself, and ${percent(after)} after NGD.`;
}

// ---------------------------------------------------------------------------------------- numbers

/** What tasks have in common whose answers are numbers. */
class NumberSpeaker {
  bars = "columns";
  things = "answers";
  another = "Another question that it gets wrong";
  invitation = "Ask a question of your own";
  praise = "Right.";

  /** words: the fields of a task's words in page.py, which all have `numbers`. */
  constructor(words) {
    Object.assign(this, words);
  }

  name(token) {
    return token < this.numbers ? String(token) : "no number";
  }

  wanted(label, share) {
    return `Right is ${label}, which gets ${percent(share)}.`;
  }

  /** All sixteen numbers. */
  shown() {
    return Array.from({ length: this.numbers }, (_, i) => i);
  }

  /** A menu for each part of a question. */
  form(tokens, changed) {
    const sizes = this.sizes();
    const parts = this.parts(tokens);
    const menus = Object.entries(sizes).map(([name, size]) => {
      const menu = element("select", { name });
      for (let i = 0; i < size; i++) menu.add(new Option(i, i, false, i === parts[name]));
      menu.onchange = () => changed(this.tokens(menus.map((each) => Number(each.value))));
      return menu;
    });
    const labels = menus.map((menu) => element("label", {}, `${menu.name} `, menu));
    return element("div", { class: "menus" }, ...labels);
  }

  /** The first question that a single move can mend. */
  begin() {
    const says = (tokens, pathway) => largest(model.forward(tokens, pathway).logits, 1)[0];
    const easy = prompts.slice(0, 20).find((tokens) => {
      const { label } = this.truth(tokens);
      const { pathway } = bestMove(tokens, label, model.forward(tokens).pathway);
      return says(tokens) !== label && says(tokens, pathway) === label;
    });
    ask(easy ?? prompts[0]);
  }
}

class SkillsSpeaker extends NumberSpeaker {
  task = `The model has learnt a small language. Most of its cues mean one thing in two of four
    dialects and another in the other two, as <i>pants</i> does in London and in New York. In
    training the dialect was mostly hidden. So it knows both readings, and often takes the wrong
    one.`;

  lede({ parameters }) {
    return `In this page runs a whole mixture-of-experts model, ${parameters.toLocaleString("en")}
      weights. It was asked a question and gives the wrong answer, though it knows better.
      <b>Drag the expert with the arrow up</b> and see.`;
  }

  sizes() {
    const dialects = this.meaning[0].length;
    return { dialect: dialects, a: this.numbers, b: this.numbers, cue: this.meaning.length };
  }

  parts([marker, a, b, cue]) {
    return { dialect: marker - this.none - 1, a, b, cue: cue - this.firstCue };
  }

  tokens([dialect, a, b, cue]) {
    return [this.none + 1 + dialect, a, b, this.firstCue + cue];
  }

  question(tokens) {
    const { dialect, a, b, cue } = this.parts(tokens);
    return `In dialect ${dialect}, what is cue ${cue} of ${a} and ${b}?`;
  }

  say(tokens) {
    const { dialect, a, b, cue } = this.parts(tokens);
    return `dialect ${dialect}, cue ${cue} of ${a} and ${b}`;
  }

  chips(tokens) {
    return Object.entries(this.parts(tokens)).map(([name, value]) => `${name} ${value}`);
  }

  /** The right answer, the answer by the cue's other meaning, and why. */
  truth(tokens) {
    const { dialect, a, b, cue } = this.parts(tokens);
    const meanings = this.meaning[cue];
    const [skill, other] = [meanings[dialect], meanings.find((each) => each !== meanings[dialect])];
    const result = (which) => this.results[which][a * this.numbers + b];
    const label = result(skill);
    const own = `Right is ${label}: there, cue ${cue} means ${this.skills[skill]}.`;
    if (other === undefined) return { label, other: null, why: `${own} So it does everywhere.` };
    const dialects = meanings.flatMap((each, d) => (each === other ? [d] : [])).join(" and ");
    const else_ = `In dialects ${dialects} it means ${this.skills[other]}: ${result(other)}.`;
    return { label, other: result(other), why: `${own} ${else_}` };
  }
}

/** Prompts [f, g, x] whose answer is g(f(x)); there may be more functions in a row. */
class CompositionSpeaker extends NumberSpeaker {
  task = `The model has learnt tables of functions, each by itself, and some of them in a row. The
    others it never saw together. It can answer them only if it composes what it knows. A function 0
    changes nothing.`;

  lede({ parameters }) {
    return `In this page runs a whole mixture-of-experts model, ${parameters.toLocaleString("en")}
      weights. It is asked for one function after another, in a combination that it has never seen.
      <b>Drag an expert</b>, and watch the answer change.`;
  }

  letter(step) {
    return "fghijklm"[step] ?? `f${step}`;
  }

  sizes() {
    const entries = this.functions.map((step, i) => [this.letter(i), step.length]);
    return Object.fromEntries([...entries, ["x", this.numbers]]);
  }

  /** The functions' places in their tables, and the number. */
  values(tokens) {
    const size = this.functions[0].length;
    const step = (token, i) => token - this.numbers - i * size;
    return tokens.map((token, i) => (i < this.functions.length ? step(token, i) : token));
  }

  parts(tokens) {
    const values = this.values(tokens);
    return Object.fromEntries(Object.keys(this.sizes()).map((name, i) => [name, values[i]]));
  }

  tokens(values) {
    const size = this.functions[0].length;
    const token = (value, i) => value + this.numbers + i * size;
    return values.map((value, i) => (i < this.functions.length ? token(value, i) : value));
  }

  say(tokens) {
    const values = this.values(tokens);
    const inside = String(values.at(-1));
    return this.functions.reduce((so, _, i) => `${this.letter(i)}${values[i]}(${so})`, inside);
  }

  question(tokens) {
    return `What is ${this.say(tokens)}?`;
  }

  chips(tokens) {
    return Object.entries(this.parts(tokens)).map(([name, value]) => `${name} ${value}`);
  }

  /** The right answer, and how one gets there. */
  truth(tokens) {
    const values = this.values(tokens);
    const chosen = values.slice(0, -1);
    let label = values.at(-1);
    const steps = chosen.map((which, i) => {
      const before = label;
      label = this.functions[i][which][before];
      return `${this.letter(i)}${which}(${before}) = ${label}`;
    });
    const alone = chosen.filter((which) => which > 0).length < 2;
    const trained = this.trained.some((each) => String(each) === String(chosen));
    let history = "It never saw these functions together.";
    if (trained) history = "It was trained on these functions together.";
    if (alone) history = "A function alone was trained.";
    return { label, other: null, why: `${steps.join(", then ")}. ${history}` };
  }
}

// ------------------------------------------------------------------------------------------- text

class TextSpeaker {
  bars = "rows";
  things = "next words";
  another = "A story without its last word";
  invitation = "Begin a story of your own";
  praise = "The word that you want.";
  task = "Click one of the next words to want it: then the page says how close you are.";

  /** words: vocabulary (base64), end. most: the longest text, in tokens. */
  constructor(words, most) {
    this.end = words.end;
    this.most = most;
    this.bytes = words.vocabulary.map((token) => atob(token)); // a letter for each byte
    this.ranks = new Map(this.bytes.map((bytes, rank) => [bytes, rank]));
  }

  lede({ parameters }) {
    return `In this page runs a whole mixture-of-experts model, ${parameters.toLocaleString("en")}
      weights, that has learnt to tell little stories. Begin one, see what may come next, and
      <b>change its mind by dragging its experts</b>.`;
  }

  /** A text -> tokens: byte-pair encoding, piece by piece. */
  encode(text) {
    const pieces =
      /'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+$|\s+(?!\S)|\s/gu;
    const tokens = [];
    for (const [piece] of text.matchAll(pieces)) {
      const bytes = String.fromCharCode(...new TextEncoder().encode(piece));
      tokens.push(...this.merge([...bytes]));
    }
    return [this.end, ...tokens.slice(1 - this.most)];
  }

  /** Join the two neighbours whose token has the lowest rank, until no two of them are a token. */
  merge(parts) {
    for (;;) {
      const ranks = parts.slice(1).map((next, i) => this.ranks.get(parts[i] + next) ?? Infinity);
      const lowest = Math.min(...ranks);
      if (lowest === Infinity) return parts.map((bytes) => this.ranks.get(bytes));
      const at = ranks.indexOf(lowest);
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
  }

  decode(tokens) {
    const letters = tokens.filter((token) => token !== this.end).map((token) => this.bytes[token]);
    const bytes = Uint8Array.from(letters.join(""), (letter) => letter.charCodeAt(0));
    return new TextDecoder().decode(bytes);
  }

  question(tokens) {
    return `${this.say(tokens)} …`;
  }

  say(tokens) {
    const words = this.decode(tokens).trim().split(/\s+/);
    return words.length > 14 ? `… ${words.slice(-14).join(" ")}` : words.join(" ");
  }

  chips(tokens) {
    return tokens.slice(-6).map((token) => this.name(token));
  }

  /** A word, or with a hyphen a piece that goes on with one. */
  name(token) {
    if (token === this.end) return "(the end)";
    const text = this.decode([token]);
    if (text.trim() === "") return text.includes("\n") ? "(new line)" : "(blank)";
    return /^\p{L}/u.test(text) ? `-${text}` : text.trim();
  }

  truth() {
    return { label: null, other: null, why: "" };
  }

  wanted(label, share) {
    return `You want ${this.name(label)}, which gets ${percent(share)}.`;
  }

  /** The most probable tokens of either, and the one that is wanted. */
  shown(own, now, wanted) {
    const tokens = [...largest(own, 6), ...largest(now, 6), ...(wanted === null ? [] : [wanted])];
    return [...new Set(tokens)].sort((i, j) => own[j] - own[i]);
  }

  /** A field for the beginning of a story. */
  form(tokens, changed) {
    const field = element("textarea", { rows: 4, "aria-label": this.invitation });
    field.value = this.decode(tokens);
    field.oninput = () => changed(this.encode(field.value));
    return field;
  }

  begin() {
    at("own-question").open = true;
    ask(this.encode("Once upon a time, there was a little"));
  }
}
