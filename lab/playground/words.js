// Prompts and answers in words. A speaker of a task has: prompts to choose from, `say` (a prompt),
// `name` (a token), `truth` (what is known of a prompt), `shown` (the tokens with a bar), `choose`
// (the form in which the reader makes a prompt of his own).

"use strict";

/** Prompts one behind the other -> lists of tokens. */
function unpackPrompts({ lengths, tokens }) {
  const all = Array.from(unpack(tokens));
  let start = 0;
  return Array.from(unpack(lengths), (length) => all.slice(start, (start += length)));
}

/** An HTML element with attributes and children. */
function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

/** What a pathway is, for any task. */
function aboutPathway({ config, places }) {
  const many = config.router === "top_p" ? "best" : config.top_k;
  const two = places.length > config.n_layers ? " (two rows a layer here, A and B)" : "";
  return `Each row is a layer${two}, each square an expert: a small network. The layer's
    <i>router</i> gives every expert a share, and the last token visits the ${many} with the largest
    ones (framed); the others rest. All rows together are its <b>pathway</b>.`;
}

const percent = (share) => `${Math.round(100 * share)} %`;

// ---------------------------------------------------------------------------- skills and dialects

class SkillsSpeaker {
  /** words: skills, results, meaning, numbers, firstCue, none. */
  constructor(words) {
    Object.assign(this, words);
    this.bars = "columns";
    this.thing = "answers";
    this.another = "Another question that it gets wrong";
    this.invitation = "Ask your own";
    this.praise = "Right";
  }

  lede({ parameters, config }) {
    return `This page runs a whole mixture of experts, ${parameters.toLocaleString("en")} weights,
      that has learnt to answer questions about two numbers. It knows the answers, but often takes
      a wrong turn inside. <b>You can turn it the right way</b>, and no weight will change.`;
  }

  task() {
    return `A cue says what to do with two numbers. Most cues mean one thing in two of four
      dialects and another in the other two, as <i>pants</i> does in London and in New York.
      Training mostly hid the dialect: the model knows both readings, and is unsure which to use.`;
  }

  /** What is wrong with an answer. */
  wanted(label, share) {
    return `Right is ${label}, to which it gives ${percent(share)}`;
  }

  begin(prompts, { first, labels }) {
    ask(prompts[first], labels[first]);
  }

  parts(tokens) {
    const [marker, a, b, cue] = tokens;
    return { dialect: marker - this.none - 1, a, b, cue: cue - this.firstCue };
  }

  say(tokens) {
    const { dialect, a, b, cue } = this.parts(tokens);
    return `dialect ${dialect}: cue ${cue} of ${a} and ${b}`;
  }

  name(token) {
    return token < this.numbers ? String(token) : "?";
  }

  chips(tokens) {
    const { dialect, a, b, cue } = this.parts(tokens);
    return [`dialect ${dialect}`, `a = ${a}`, `b = ${b}`, `cue ${cue}`];
  }

  /** The right answer, the answer by the cue's other skill, and why. */
  truth(tokens) {
    const { dialect, a, b, cue } = this.parts(tokens);
    const place = a * this.numbers + b;
    const meanings = this.meaning[cue];
    const skill = meanings[dialect];
    const other = meanings.find((each) => each !== skill) ?? skill;
    const says = (each) => meanings.flatMap((m, d) => (m === each ? [d] : [])).join(" and ");
    const [label, otherLabel] = [this.results[skill][place], this.results[other][place]];
    const own = `In dialect ${dialect}, cue ${cue} asks for ${this.skills[skill]}: `;
    const clear = "It means that in every dialect.";
    const two = `In dialects ${says(other)} it asks for ${this.skills[other]}: ${otherLabel}.`;
    return { label, other: otherLabel, why: [own, `${label}.`, skill === other ? clear : two] };
  }

  /** All sixteen numbers. */
  shown() {
    return Array.from({ length: this.numbers }, (_, i) => i);
  }

  /** Four menus. */
  choose(tokens, changed) {
    const parts = this.parts(tokens);
    const dialects = this.meaning[0].length;
    const sizes = { dialect: dialects, a: this.numbers, b: this.numbers, cue: this.meaning.length };
    const menus = Object.entries(sizes).map(([name, size]) => {
      const menu = element("select", { id: `menu-${name}` });
      for (let i = 0; i < size; i++) menu.add(new Option(i, i, false, i === parts[name]));
      menu.onchange = () => {
        const [dialect, a, b, cue] = menus.map((each) => Number(each.value));
        changed([this.none + 1 + dialect, a, b, this.firstCue + cue]);
      };
      return menu;
    });
    const labels = menus.map((menu, i) => element("label", {}, Object.keys(sizes)[i], " ", menu));
    return element("p", { class: "menus" }, ...labels);
  }
}

// ------------------------------------------------------------------------------------------- text

class TextSpeaker {
  /** words: vocabulary (base64), end. most: the longest text, in tokens. */
  constructor(words, most) {
    this.end = words.end;
    this.most = most;
    this.bytes = words.vocabulary.map((token) => atob(token)); // a letter for each byte
    this.ranks = new Map(this.bytes.map((bytes, rank) => [bytes, rank]));
    this.bars = "rows";
    this.thing = "next words";
    this.another = "Another story, without its last word";
    this.invitation = "Begin a story of your own";
    this.praise = "The word that you want";
  }

  lede({ parameters }) {
    return `This page runs a whole mixture of experts, ${parameters.toLocaleString("en")} weights,
      that has learnt to tell little stories. Begin one, see what comes next, and
      <b>change its mind by hand</b>. No weight will change.`;
  }

  task() {
    return `Click a word above to want it: then the page says how far you are, and you can play.`;
  }

  wanted(label, share) {
    return `You want ${this.name(label)}, to which it gives ${percent(share)}`;
  }

  begin() {
    ask(this.encode("Once upon a time, there was a little"));
  }

  /** A text -> tokens: byte-pair encoding, piece by piece. */
  encode(text) {
    const pieces =
      /'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+$|\s+(?!\S)|\s/gu;
    const tokens = [this.end];
    for (const [piece] of text.matchAll(pieces)) {
      const bytes = String.fromCharCode(...new TextEncoder().encode(piece));
      tokens.push(...this.merge([...bytes]));
    }
    return [tokens[0], ...tokens.slice(1).slice(1 - this.most)];
  }

  /** Join the two neighbours whose token has the lowest rank, until none is a token. */
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

  say(tokens) {
    const text = this.decode(tokens).trim();
    return text.length > 90 ? `… ${text.slice(-90)} …` : `${text} …`;
  }

  /** A word, or with a hyphen the end of one. */
  name(token) {
    if (token === this.end) return "(the end)";
    const text = this.decode([token]);
    if (text.trim() === "") return text.includes("\n") ? "(new line)" : "(blank)";
    return /^\p{L}/u.test(text) ? `-${text}` : text.trim();
  }

  chips(tokens) {
    return tokens.slice(-6).map((token) => this.name(token));
  }

  truth() {
    return { label: null, other: null, why: [] };
  }

  /** The ten most probable tokens of either, and the one that is wanted. */
  shown(own, now, wanted) {
    const tokens = [...largest(own, 6), ...largest(now, 6), ...(wanted === null ? [] : [wanted])];
    const order = [...new Set(tokens)].sort((i, j) => own[j] - own[i]);
    return order.slice(0, 12);
  }

  /** A field for a story's beginning. */
  choose(tokens, changed) {
    const field = element("textarea", { rows: 3, id: "story", spellcheck: "false" });
    field.value = this.decode(tokens);
    field.oninput = () => changed(this.encode(field.value));
    field.setAttribute("aria-label", this.invitation);
    return field;
  }
}
