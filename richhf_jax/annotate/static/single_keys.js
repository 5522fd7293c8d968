// The switch #single-keys: keys of one letter, digit or sign can be turned off (WCAG 2.1.4), for voices type them.

const NAME = "richhf_jax single keys are off";
const box = document.getElementById("single-keys");
const told = [...document.querySelectorAll("[aria-keyshortcuts]")].map((element) => [
  element,
  element.getAttribute("aria-keyshortcuts"),
]);

export const areOn = () => box.checked;

// Screen readers are told only keys that work.
function tell() {
  for (const [element, keys] of told) {
    const left = keys.split(" ").filter((key) => box.checked || /^(Control|Enter)/.test(key));
    if (left.length) element.setAttribute("aria-keyshortcuts", left.join(" "));
    else element.removeAttribute("aria-keyshortcuts");
  }
}

box.checked = localStorage.getItem(NAME) === null;
tell();
box.addEventListener("change", () => {
  if (box.checked) localStorage.removeItem(NAME);
  else localStorage.setItem(NAME, "true");
  tell();
});
