// The page of a survey: one pair of images after the other; each choice is saved on the server.
//
// Neither this script nor anything that it gets knows the generators.

import { announce, askWhy, listenToKeys, request, Saver, seconds, start } from "./rater.js";

const $ = (id) => document.getElementById(id);
const form = $("task");
const pair = $("pair");
const images = [$("left"), $("right")];
// A finger that rests this long enlarges; one that moves before scrolls the page. Milliseconds.
const HOLD = 250;

let work = null; // What the server sent of the pair.
let answer = null; // 1 to 5, or null.
let isOpen = false; // Whether the answer may change.

const saver = new Saver({
  answer: () => answer,
  isSame: (one, other) => one === other,
  show(other) {
    answer = other;
    render();
  },
  setOpen,
});

// ---- From pair to pair.

async function open(path) {
  const reply = await request("GET", path);
  if (reply.status !== 200) return reply;
  const { done, left } = reply.progress;
  $("progress").max = Math.max(done + left, 1);
  $("progress").value = done;
  $("count").textContent = `${done} done · about ${left} left`;
  if (reply.work) await begin(reply.work);
  return reply;
}

async function next() {
  const { status, error, work: found, message, progress } = await open("/api/next");
  if (status !== 200) return saver.stop(error);
  if (found) return;
  saver.stop(message);
  if (!progress.done) return;
  const back = document.createElement("button");
  back.textContent = "Previous pair";
  back.addEventListener("click", showPrevious);
  $("notice").append(" ", back);
}

async function showPrevious() {
  const { status, error } = await open("/api/previous");
  if (status === 200) return;
  if (!saver.isActive) return saver.stop(error);
  setOpen(true);
  $("missing").textContent = error;
}

async function begin(given) {
  work = given;
  ({ answer } = work);
  delete form.dataset.shown;
  form.hidden = false;
  $("notice").hidden = true;
  $("missing").textContent = "";
  $("prompt").textContent = work.prompt;
  $("correcting").hidden = work.state !== "done";
  enlarge(false);
  setOpen(true);
  scrollTo(0, 0);
  $("prompt-part").focus({ preventScroll: true });
  render();
  const shown = showImages();
  await saver.begin(work.token, `/api/pairs/${work.token}`, work);
  await shown;
}

async function showImages() {
  const { token } = work;
  for (const image of images) {
    image.removeAttribute("src");
    image.src = `/image/${token}/${image.id}`;
  }
  try {
    await Promise.all(images.map((image) => image.decode()));
  } catch {
    if (token === work.token) $("missing").textContent = "The images can't be shown. Look again, or skip the pair.";
    return;
  }
  if (token !== work.token) return;
  // Before, a choice would be blind.
  form.dataset.shown = token;
  pair.style.setProperty("--aspect", Math.min(...images.map((image) => image.naturalWidth / image.naturalHeight)));
}

function setOpen(value) {
  isOpen = value;
  for (const field of form.querySelectorAll("fieldset, .end button")) field.disabled = !value;
}

async function finish() {
  if (!isOpen) return;
  if (answer === null) {
    $("missing").textContent = "Please choose an answer.";
    form.elements.answer[0].focus();
  } else if (await saver.end("/done", () => ({ answer, seconds: seconds() }))) await next();
}

async function skip() {
  if (!isOpen || work.state === "done") return;
  const reason = await askWhy("Skip this pair", true);
  if (reason !== null && (await saver.end("/skip", () => ({ reason })))) await next();
}

// Shows the pair answered last. The open one comes again after it, with what was chosen.
async function previous() {
  if (!isOpen || work.state === "done") return;
  setOpen(false);
  await saver.saved();
  if (saver.isActive) await showPrevious();
}

// ---- The answer.

function choose(value) {
  if (!isOpen || !form.dataset.shown) return render();
  if (value === answer) return;
  answer = value;
  $("missing").textContent = "";
  render();
  announce(form.elements.answer[value - 1].parentElement.querySelector("span").textContent);
  saver.save();
}

function render() {
  for (const field of form.elements.answer) field.checked = Number(field.value) === answer;
  form.querySelector("[data-action=previous]").hidden = form.querySelector("[data-action=skip]").hidden =
    work.state === "done";
}

// ---- Both images enlarged, at the same place.

function enlarge(value) {
  pair.classList.toggle("enlarged", value);
  form.querySelector("[data-action=enlarge]").setAttribute("aria-pressed", value);
}
function look({ clientX, clientY, target }) {
  const box = target.closest(".view")?.getBoundingClientRect();
  if (!box) return;
  pair.style.setProperty("--x", `${(100 * (clientX - box.left)) / box.width}%`);
  pair.style.setProperty("--y", `${(100 * (clientY - box.top)) / box.height}%`);
}
let holding = null;
pair.addEventListener("pointerdown", (event) => {
  if (event.button || !event.target.closest(".view")) return;
  look(event);
  holding = setTimeout(() => enlarge(true), event.pointerType === "mouse" ? 0 : HOLD);
});
pair.addEventListener("pointermove", look);
for (const type of ["pointerup", "pointercancel"])
  addEventListener(type, () => {
    if (holding === null) return;
    clearTimeout(holding);
    holding = null;
    enlarge(false);
  });
pair.addEventListener("contextmenu", (event) => event.preventDefault());

// ---- Buttons and keys.

const actions = { previous, skip, enlarge: () => enlarge(!pair.classList.contains("enlarged")) };
form.addEventListener("click", ({ target }) => actions[target.closest("[data-action]")?.dataset.action]?.());
form.addEventListener("change", ({ target }) => choose(Number(target.value)));
form.addEventListener("submit", (event) => {
  event.preventDefault();
  finish();
});

const keys = {
  Enter: finish,
  Backspace: previous,
  z: actions.enlarge,
  k: skip,
  g: () => $("guidelines").showModal(),
  "?": () => $("keys").showModal(),
};
for (let value = 1; value <= 5; value++) keys[value] = () => choose(value);
listenToKeys(saver, ({ key, target }, isControl) => {
  if (isControl || (key === "Enter" && target.matches("button, a"))) return null;
  return Object.hasOwn(keys, key) ? keys[key] : null;
});

start(next);
