// What every page for raters needs: time spent, requests, saving at each change, dialogs and keys.

import { areOn as areSingleKeysOn } from "./single_keys.js";

const $ = (id) => document.getElementById(id);
const { site, person } = document.body.dataset;
// What the browser keeps is this person's in this project: another project may have been served at this address.
const owner = `richhf_jax ${site} ${person}`;
// A pause longer than this is no work: it does not count as time spent. Milliseconds.
const IDLE = 30_000;
// Seconds between two tries to save.
const MAX_WAIT = 30;

export const announce = (text) => ($("spoken").textContent = text);

// ---- Time spent.

let spent = 0;
let lastSign = null;
function countTime() {
  const now = performance.now();
  if (lastSign !== null && now - lastSign <= IDLE) spent += now - lastSign;
  lastSign = now;
}
for (const type of ["pointermove", "pointerdown", "keydown", "wheel", "scroll"])
  addEventListener(type, countTime, { passive: true, capture: true });
document.addEventListener("visibilitychange", () => {
  countTime();
  if (document.hidden) lastSign = null;
});
export const seconds = () => {
  countTime();
  return spent / 1000;
};

// ---- The server.

export async function request(method, path, body) {
  try {
    const headers = { "Content-Type": "application/json" };
    const response = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
    const reply = await response.json().catch(() => ({ error: `The server answered ${response.status}.` }));
    return { ...reply, status: response.status };
  } catch {
    return { status: 0, error: "The server can't be reached." };
  }
}
const isTemporary = (status) => status === 0 || status === 429 || status >= 500;
function pause(wait) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, 1000 * wait);
    addEventListener("online", () => (clearTimeout(timer), resolve()), { once: true });
  });
}
export function ask(dialog) {
  return new Promise((resolve) => {
    dialog.returnValue = "";
    dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true });
    dialog.showModal();
  });
}
function remember(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
  } catch {
    // The browser's storage is full, so the server alone keeps the answer.
  }
}

// Saves the answer that the page shows. Until the server has it, the browser keeps it: with the revision that it
// changes, and what was sent since.
export class Saver {
  #name = null;
  #address = null; // null: no answer is open.
  #revision = 0;
  #isDirty = false;
  #saving = null;
  #sent = []; // Answers that the server may have got, though its reply is missing.
  #ended = null; // The answer of the last end.

  // `page` has answer(), isSame(answer, other), show(answer, isTheirs), setOpen(value), and showMissing(reply) where
  // parts of an answer may be missing, tell(reply) where a reply may hold more of the item.
  constructor(page) {
    this.page = page;
    addEventListener("beforeunload", (event) => {
      if (this.#saving) event.preventDefault();
    });
  }

  get isActive() {
    return this.#address !== null;
  }

  // Begins with an item that the page shows with the server's answer; takes up the answer that the browser kept
  // because the server could not be reached.
  async begin(id, address, { answer, revision, seconds }) {
    this.#name = `${owner} ${id}`;
    [this.#address, this.#revision, this.#sent, this.#ended] = [address, revision, [], null];
    spent = 1000 * seconds;
    const mine = JSON.parse(localStorage.getItem(this.#name));
    if (!mine || this.page.isSame(mine.answer, answer)) return;
    [this.#sent, spent] = [mine.sent, 1000 * mine.seconds];
    this.page.show(mine.answer, false);
    if (mine.revision !== revision) await this.#settle({ answer, revision });
    if (!this.page.isSame(this.page.answer(), answer)) this.save();
  }

  // Waits until the server has the last change, or the page was stopped.
  async saved() {
    await this.#saving;
  }

  save() {
    this.#isDirty = true;
    this.#keep();
    this.#saving ??= this.#saveAll().finally(() => (this.#saving = null));
    return this.#saving;
  }

  #keep() {
    const kept = { revision: this.#revision, answer: this.page.answer(), sent: this.#sent, seconds: seconds() };
    remember(this.#name, kept);
  }

  async #saveAll() {
    let wait = 1;
    while (this.#isDirty) {
      this.#isDirty = false;
      const answer = this.page.answer();
      this.#sent.push(answer);
      $("saved").textContent = "Saving…";
      const reply = await request("PUT", this.#address, { revision: this.#revision, answer, seconds: seconds() });
      if (reply.status === 200) {
        this.#revision = reply.revision;
        this.#sent = [];
        wait = 1;
        if (this.#isDirty) this.#keep();
      } else if (reply.status === 409) {
        await this.#settle(reply);
      } else if (isTemporary(reply.status)) {
        this.#isDirty = true;
        $("saved").textContent = `Not saved yet: ${reply.error} Your answer is kept in this browser.`;
        document.body.classList.add("unsaved");
        announce($("saved").textContent);
        await pause(wait);
        wait = Math.min(2 * wait, MAX_WAIT);
      } else {
        return this.stop(reply.error);
      }
    }
    localStorage.removeItem(this.#name);
    document.body.classList.remove("unsaved");
    $("saved").textContent = "Saved";
  }

  // The server has a revision that this tab doesn't know. The rater decides, unless it is what this tab sent.
  async #settle(theirs) {
    // The reply to an end may be missing, too, after which the item stays open.
    const known = this.#ended === null ? this.#sent : [...this.#sent, this.#ended];
    let choice = known.some((mine) => this.page.isSame(mine, theirs.answer)) ? "mine" : "";
    while (!choice) choice = await ask($("conflict"));
    this.page.tell?.(theirs);
    if (choice === "theirs") this.page.show(theirs.answer, true);
    this.#revision = theirs.revision;
    this.#sent = [];
    this.#isDirty = !this.page.isSame(this.page.answer(), theirs.answer);
  }

  // Ends work on the item in one of two ways; the server has the last change before. Returns the reply, or null
  // where there is none. `body` makes what is sent beside the revision.
  async end(way, body) {
    this.page.setOpen(false);
    await this.#saving;
    if (!this.isActive) return null;
    const sent = body();
    this.#ended = sent.answer ?? null;
    const reply = await request("POST", this.#address + way, { revision: this.#revision, ...sent });
    if (reply.status === 200) {
      localStorage.removeItem(this.#name);
      // Where a revision comes back, the work goes on with it.
      if (reply.revision) {
        this.#revision = reply.revision;
        this.page.setOpen(true);
      }
      return reply;
    }
    this.page.setOpen(true);
    if (reply.status === 409) {
      await this.#settle(reply);
      if (this.#isDirty) this.save();
    } else if (reply.status === 422) this.page.showMissing(reply);
    else if (isTemporary(reply.status)) $("missing").textContent = `${reply.error} Please try again.`;
    else this.stop(reply.error);
    return null;
  }

  // Shows a text in place of the task.
  stop(text) {
    this.#address = null;
    this.page.setOpen(false);
    $("task").hidden = true;
    $("notice").hidden = false;
    const again = document.createElement("button");
    again.textContent = "Look again";
    again.addEventListener("click", () => location.reload());
    const message = document.createElement("p");
    message.textContent = text;
    $("notice").replaceChildren(message, again);
    $("notice").focus();
  }
}

// ---- Dialogs, keys and the start.

// Asks why an item is skipped. Returns null where it isn't.
export async function askWhy(title, isRequired) {
  const dialog = $("leave");
  const reason = dialog.querySelector("textarea");
  $("leave-title").textContent = title;
  reason.value = "";
  reason.required = isRequired;
  return (await ask(dialog)) === "leave" ? reason.value : null;
}

$("leave").querySelector("button").addEventListener("click", () => $("leave").close());
for (const id of ["guidelines", "keys"]) $(`show-${id}`).addEventListener("click", () => $(id).showModal());

// `actionOf` returns what a key does, or null. Dialogs take the keys while they are open.
export function listenToKeys(saver, actionOf) {
  document.addEventListener("keydown", (event) => {
    // Some keyboards type signs with AltGr, which counts as Ctrl and Alt.
    const isAltGraph = event.getModifierState("AltGraph");
    const isControl = (event.ctrlKey || event.metaKey) && !isAltGraph;
    if (event.key.length === 1 && event.key !== " " && !isControl && !areSingleKeysOn()) return;
    if (!saver.isActive || document.querySelector("dialog[open]") || (event.altKey && !isAltGraph)) return;
    const action = actionOf(event, isControl, event.target.matches("textarea"));
    if (!action) return;
    event.preventDefault();
    action(event.target);
  });
}

// Who comes for the first time reads the guidelines.
export async function start(next) {
  const name = `${owner} has read`;
  if (!localStorage.getItem(name)) {
    await ask($("guidelines"));
    remember(name, true);
  }
  await next();
}
