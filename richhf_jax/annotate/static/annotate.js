// The rater's page: one image after the other; each change of an answer is saved on the server.
//
// An answer is a value: a change makes a new one, so undo is a list of earlier answers. `render` shows the
// present answer; nothing else writes to the form.

import { Picture } from "./picture.js";
import { announce, askWhy, listenToKeys, request, Saver, seconds, start } from "./rater.js";

const $ = (id) => document.getElementById(id);
const { radius } = document.body.dataset;
const form = $("task");
const svg = $("image");
const kinds = [...form.querySelectorAll("[name=kind]")].map((field) => field.value);
const scales = [...form.querySelectorAll(".likert")].map((scale) => scale.dataset.part);
const asksWords = form.querySelector("[data-part=words]") !== null;

let work = null; // What the server sent of the image.
let answer = null;
let past = [];
let future = [];
let lastChange = null;
let isOpen = false; // Whether the answer may change.

const pointsOf = (from, kind) => from[`${kind}_points`];

// Two answers are the same if these are: the order of an object's fields says nothing.
function summary(from) {
  const points = kinds.map((kind) => [pointsOf(from, kind), Boolean(from.nothing[kind])]);
  const ratings = scales.map((name) => from.ratings[name] ?? null);
  return JSON.stringify([points, from.token_labels, Boolean(from.nothing.words), ratings, from.comment]);
}
const isSame = (one, other) => summary(one) === summary(other);

const saver = new Saver({
  answer: () => answer,
  isSame,
  show(other, isTheirs) {
    if (isTheirs) past.push(answer);
    answer = other;
    render();
  },
  setOpen(value) {
    setOpen(value);
    if (value) render();
  },
  showMissing,
  tell({ suggestion }) {
    if (suggestion) showSuggestion(suggestion);
  },
});

// ---- From image to image.

async function next() {
  const reply = await request("GET", "/api/next");
  if (reply.status !== 200) return saver.stop(reply.error);
  const { done, total_open: open, seconds: total, calibration_left: practice } = reply.progress;
  $("progress").max = Math.max(done + open, 1);
  $("progress").value = done;
  $("count").textContent =
    `${done} done · about ${open} left · ${Math.round(total / 60)} min` + (practice ? ` · practice: ${practice} left` : "");
  if (!reply.work) return saver.stop(reply.message);
  await begin(reply.work);
}

async function begin(given) {
  work = given;
  ({ answer } = work);
  [past, future, lastChange] = [[], [], null];
  form.hidden = false;
  $("notice").hidden = $("feedback").hidden = true;
  $("practice").hidden = !work.is_calibration;
  $("practice").textContent = "Practice: you will see our answers after yours.";
  $("missing").textContent = "";
  for (const element of form.querySelectorAll(".gold")) element.classList.remove("gold");
  const prompt = work.pieces.map(([text]) => text).join("");
  picture.open(work, `Image of ${work.width} × ${work.height} pixels, made from: ${prompt}`);
  showWords();
  setOpen(true);
  scrollTo(0, 0);
  svg.focus({ preventScroll: true });
  render();
  if (work.suggestion) showSuggestion(work.suggestion);
  await saver.begin(work.id, `/api/items/${encodeURIComponent(work.id)}`, work);
}

function setOpen(value) {
  isOpen = value;
  form.classList.toggle("closed", !value);
  for (const field of form.querySelectorAll("fieldset, textarea, .end button")) field.disabled = !value;
}

async function finish() {
  if (!isOpen) return;
  const reply = await saver.end("/done", () => ({ answer, seconds: seconds() }));
  if (reply?.suggestion) showSuggestion(reply.suggestion);
  else if (reply?.feedback) showFeedback(reply.feedback);
  else if (reply) await next();
}

async function giveUp(broken) {
  const reason = await askWhy(broken ? "The image is broken" : "Skip this image", !broken);
  if (reason !== null && (await saver.end("/skip", () => ({ reason, broken })))) await next();
}

function showMissing({ error, missing }) {
  $("missing").textContent = error;
  for (const part of form.querySelectorAll("[data-part]"))
    part.classList.toggle("missing", missing.includes(part.dataset.part));
  form.querySelector(".missing [name=nothing], .missing.likert input")?.focus();
}

// After a practice image: our answer, on top of the rater's.
const showFeedback = ({ lines, gold }) => compare("gold", lines, gold);
// After a first answer, which may now be changed: the model's.
const showSuggestion = ({ lines, answer: suggested }) => compare("suggestion", lines, suggested);

function compare(name, lines, gold) {
  for (const text of $("feedback").querySelectorAll("[data-of]")) text.hidden = text.dataset.of !== name;
  const items = lines.map((line) => Object.assign(document.createElement("li"), { textContent: line }));
  $("feedback-lines").replaceChildren(...items);
  picture.drawGold(Object.fromEntries(kinds.map((kind) => [kind, pointsOf(gold, kind)])));
  for (const [index, word] of [...$("words").querySelectorAll("button")].entries())
    word.classList.toggle("gold", gold.token_labels[index] === 0);
  for (const name of scales) {
    for (const field of form.elements[name])
      field.parentElement.classList.toggle("gold", Number(field.value) === gold.ratings[name]);
  }
  $("feedback").hidden = false;
  $("feedback").focus();
}

// ---- The answer.

function change(edit, label = null) {
  if (!isOpen) return render();
  const before = answer;
  answer = structuredClone(answer);
  edit(answer);
  if (isSame(before, answer)) return;
  // A comment's letters, or a point's steps by arrow keys, are one change.
  if (label === null || label !== lastChange) past.push(before);
  lastChange = label;
  future = [];
  render();
  saver.save();
}
function step(from, to) {
  if (!isOpen || !from.length) return;
  to.push(answer);
  answer = from.pop();
  lastChange = null;
  render();
  saver.save();
}
const isEmpty = (part) =>
  part === "words" ? !answer.token_labels.includes(0) : !pointsOf(answer, part).length;

function removePoint(kind, index) {
  if (!pointsOf(answer, kind).length) return;
  // Else the focus would be at another point, which the next Backspace would remove.
  svg.focus({ preventScroll: true });
  change((next) => pointsOf(next, kind).splice(index, 1));
  announce(`${kind} point removed`);
}
const picture = new Picture(svg, radius, kinds, {
  mark(point) {
    const kind = form.elements.kind?.value;
    if (!kind) return;
    change((next) => {
      pointsOf(next, kind).push(point);
      next.nothing[kind] = false;
    });
    announce(`${kind} point at ${point.map(Math.round).join(", ")}`);
  },
  remove: removePoint,
  move: (kind, index, point, label) => change((next) => (pointsOf(next, kind)[index] = point), label),
  cancel: () => saver.isActive && render(),
});
function toggleWord(index) {
  change((next) => {
    next.token_labels[index] = 1 - next.token_labels[index];
    next.nothing.words &&= next.token_labels[index] === 1;
  });
}
function setNothing(parts, value) {
  change((next) => parts.filter(isEmpty).forEach((part) => (next.nothing[part] = value)));
}
function toggleNothing(part) {
  if (isEmpty(part)) setNothing([part], !answer.nothing[part]);
  else announce(`${part}: there are marks`);
}
function rate(value) {
  const focused = document.activeElement.closest(".likert")?.dataset.part;
  const name = focused ?? scales.find((scale) => !answer.ratings[scale]);
  if (!name) return announce("All scales have an answer. Press s to go to one.");
  change((next) => (next.ratings[name] = value));
  announce(`${name}: ${value}`);
  const following = scales[scales.indexOf(name) + 1];
  if (focused && following) focusScale(following);
}
function focusScale(name) {
  const fields = [...form.elements[name]];
  (fields.find((field) => field.checked) ?? fields[0]).focus();
}
function nextScale() {
  const focused = document.activeElement.closest(".likert")?.dataset.part;
  focusScale(scales[(scales.indexOf(focused) + 1) % scales.length]);
}

// ---- What is shown.

function render() {
  picture.draw(Object.fromEntries(kinds.map((kind) => [kind, pointsOf(answer, kind)])));
  for (const part of form.querySelectorAll(".missing")) part.classList.remove("missing");
  $("missing").textContent = "";
  for (const kind of kinds)
    form.querySelector(`.kind.${kind} output`).value = pointsOf(answer, kind).length || "";
  for (const box of form.querySelectorAll("[name=nothing]")) {
    box.checked = answer.nothing[box.value];
    box.disabled = !isEmpty(box.value);
  }
  for (const [index, word] of [...$("words").querySelectorAll("button")].entries())
    word.setAttribute("aria-pressed", answer.token_labels[index] === 0);
  for (const name of scales) {
    for (const field of form.elements[name]) field.checked = Number(field.value) === answer.ratings[name];
  }
  const current = scales.find((name) => !answer.ratings[name]);
  for (const scale of form.querySelectorAll(".likert"))
    scale.classList.toggle("current", scale.dataset.part === current);
  if (form.elements.comment.value !== answer.comment) form.elements.comment.value = answer.comment;
  form.querySelector("[data-action=undo]").disabled = !past.length;
  form.querySelector("[data-action=redo]").disabled = !future.length;
}

function showWords() {
  let index = 0;
  const pieces = work.pieces.map(([text, isWord]) => {
    if (!isWord || !asksWords) return text;
    const word = document.createElement("button");
    word.type = "button";
    word.textContent = text;
    word.dataset.index = index;
    // One stop for the Tab key; arrows go from word to word.
    word.tabIndex = index++ ? -1 : 0;
    return word;
  });
  $("words").replaceChildren(...pieces);
}
function focusWord(word) {
  if (!word) return;
  for (const other of $("words").querySelectorAll("button")) other.tabIndex = other === word ? 0 : -1;
  word.focus();
}

svg.querySelector("image").addEventListener("error", () => {
  $("missing").textContent = "The image can't be shown. Look again, or say that it is broken.";
});

// ---- Buttons, fields and keys.

const actions = {
  undo: () => step(past, future),
  redo: () => step(future, past),
  zoomIn: () => picture.zoom(1.5, picture.middle),
  zoomOut: () => picture.zoom(1 / 1.5, picture.middle),
  fit: () => picture.fit(),
  hide: () => {
    const isHidden = svg.classList.toggle("bare");
    form.querySelector("[data-action=hide]").setAttribute("aria-pressed", isHidden);
  },
  skip: () => isOpen && giveUp(false),
  broken: () => isOpen && giveUp(true),
  next,
};
document.addEventListener("click", ({ target }) => {
  const button = target.closest("[data-action]");
  if (button) return actions[button.dataset.action]();
  const word = target.closest("#words button");
  if (word && isOpen) {
    focusWord(word);
    toggleWord(Number(word.dataset.index));
  }
});
form.addEventListener("change", ({ target }) => {
  if (scales.includes(target.name)) change((next) => (next.ratings[target.name] = Number(target.value)));
  else if (target.name === "nothing") setNothing([target.value], target.checked);
});
form.elements.comment.addEventListener("input", ({ target }) =>
  change((next) => (next.comment = target.value), "comment"),
);
form.addEventListener("submit", (event) => {
  event.preventDefault();
  finish();
});

function choose(kind) {
  form.elements.kind.value = kind;
  picture.aim(true);
  announce(`A click or Space marks ${kind}`);
}
function erase(target) {
  if (target.matches(".mark")) removePoint(target.dataset.kind, Number(target.dataset.index));
  else if (kinds.length) removePoint(form.elements.kind.value, -1);
}
const keys = {
  n: () => setNothing([...kinds, ...(asksWords ? ["words"] : [])], true),
  w: () => focusWord($("words").querySelector("button[tabindex='0']")),
  W: () => asksWords && toggleNothing("words"),
  s: nextScale,
  c: () => form.elements.comment.focus(),
  z: actions.undo,
  y: actions.redo,
  "+": () => picture.zoom(1.5),
  "=": () => picture.zoom(1.5),
  "-": () => picture.zoom(1 / 1.5),
  0: actions.fit,
  h: actions.hide,
  k: actions.skip,
  b: actions.broken,
  g: () => $("guidelines").showModal(),
  "?": () => $("keys").showModal(),
  Backspace: erase,
  Delete: erase,
  Escape: () => svg.focus(),
  Enter: () => (isOpen || $("feedback").hidden ? finish() : next()),
};
for (const kind of kinds) {
  keys[kind[0]] = () => choose(kind);
  keys[kind[0].toUpperCase()] = () => toggleNothing(kind);
}
for (let value = 1; value <= 5; value++) keys[value] = () => isOpen && scales.length && rate(value);
const controlKeys = { z: actions.undo, Z: actions.redo, y: actions.redo, Enter: keys.Enter };
const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function actionOf({ key, target, shiftKey }, isControl, isTyping) {
  if (isControl) return isTyping && key !== "Enter" ? null : controlKeys[key];
  if (isTyping) return key === "Escape" ? keys.Escape : null;
  if (key === "Enter" && target.matches("button, a")) return null;
  if (arrows[key] && target.matches("#image, .mark")) return () => picture.step(target, ...arrows[key], shiftKey);
  if (arrows[key] && target.matches("#words button")) {
    const words = [...$("words").querySelectorAll("button")];
    const by = arrows[key][0] || arrows[key][1];
    return () => focusWord(words[words.indexOf(target) + by]);
  }
  if (key === " " && target === svg) return () => picture.mark();
  return Object.hasOwn(keys, key) ? keys[key] : null;
}
listenToKeys(saver, actionOf);

start(next);
