// The image with its points: drawing, zoom and pan, mouse, pen, fingers and the cursor of the arrow keys.
//
// Points are in the image's pixels. Whole numbers are the middle of a pixel, as in the raw ratings, so the SVG's
// viewBox begins at -0.5. The viewBox is the part of the image in sight.

const SVG = "http://www.w3.org/2000/svg";
// A press that moves less than this many CSS pixels is a click.
const CLICK = 4;
// The part of a point to click on, in CSS pixels around its middle.
const HANDLE = 12;
const MAX_ZOOM = 16;

export const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const hundredths = (value) => Math.round(100 * value) / 100;
const apart = (a, b) => Math.hypot(a.x - b.x, a.y - b.y);

export function make(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

export class Picture {
  // `radius`: of a point's disk, as a share of the image's height. `events`: functions that the picture calls,
  // mark(point) for a click beside all points, remove(kind, index) and move(kind, index, point, label).
  constructor(svg, radius, kinds, events) {
    Object.assign(this, { svg, radius, kinds, events, pressed: new Map(), press: null });
    [this.image, this.gold, this.disks, this.cursorMark, this.marks] = svg.children;
    svg.addEventListener("pointerdown", (event) => this.#down(event));
    svg.addEventListener("pointermove", (event) => this.#moved(event));
    svg.addEventListener("pointerup", (event) => this.#up(event));
    svg.addEventListener("pointercancel", (event) => this.#cancel(event));
    svg.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    addEventListener("resize", () => this.size && this.#scaleMarks());
  }

  // Shows another image, whole: {image, width, height, prompt}.
  open({ image, width, height }, label) {
    this.size = { width, height };
    this.cursor = { x: Math.floor(width / 2), y: Math.floor(height / 2) };
    for (const [key, value] of Object.entries({ href: image, width, height })) this.image.setAttribute(key, value);
    this.svg.setAttribute("aria-label", label);
    this.svg.style.setProperty("--aspect", `${width} / ${height}`);
    this.gold.replaceChildren();
    this.fit();
  }

  // Draws the points of an answer: {kind: [[x, y], ...]}.
  draw(points) {
    const focused = document.activeElement.closest(".mark")?.dataset;
    const all = this.kinds.flatMap((kind) => points[kind].map((point, index) => [kind, index, point]));
    this.disks.replaceChildren(...all.map(([kind, , point]) => this.#disk(kind, point)));
    this.marks.replaceChildren(...all.map((mark) => this.#mark(...mark)));
    this.#scaleMarks();
    if (!focused) return;
    // The focus stays at the point, or goes to the image if the point is gone.
    const isSame = ({ dataset }) => dataset.kind === focused.kind && dataset.index === focused.index;
    ([...this.marks.children].find(isSame) ?? this.svg).focus({ preventScroll: true });
  }

  drawGold(points) {
    const all = this.kinds.flatMap((kind) => points[kind].map((point) => this.#disk(`${kind} gold`, point)));
    this.gold.replaceChildren(...all);
  }

  #disk(names, [x, y]) {
    return make("circle", { class: `disk ${names}`, cx: x, cy: y, r: this.radius * this.size.height });
  }

  #mark(kind, index, [x, y]) {
    const label = `${kind} point ${index + 1} at ${Math.round(x)}, ${Math.round(y)}`;
    // The kinds differ in shape as well as in colour.
    const shape = this.kinds.indexOf(kind) ? "M-4-4L4 4M-4 4L4-4" : "M-5 0H5M0-5V5";
    const attributes = { class: `mark ${kind}`, tabindex: 0, role: "button", "aria-label": label };
    const mark = make("g", attributes, make("circle", { r: HANDLE }), make("path", { d: shape }));
    Object.assign(mark.dataset, { kind, index, x, y });
    return mark;
  }

  // ---- What is in sight.

  fit() {
    this.view = { x: -0.5, y: -0.5, ...this.size };
    this.#show();
  }

  // Enlarges by a factor; the point (x, y) stays where it is.
  zoom(factor, { x, y } = this.cursor) {
    const width = clamp(this.view.width / factor, this.size.width / MAX_ZOOM, this.size.width);
    const scale = width / this.view.width;
    this.view = {
      x: x - (x - this.view.x) * scale, y: y - (y - this.view.y) * scale, width, height: this.view.height * scale,
    };
    this.#show();
  }

  get middle() {
    return { x: this.view.x + this.view.width / 2, y: this.view.y + this.view.height / 2 };
  }

  get #isZoomed() {
    return this.view.width < this.size.width;
  }

  // CSS pixels of a pixel of the image.
  get #scale() {
    return this.svg.getScreenCTM()?.a || 1;
  }

  #pan(across, down) {
    this.view.x += across;
    this.view.y += down;
    this.#show();
  }

  #show() {
    const { view, size } = this;
    view.x = clamp(view.x, -0.5, size.width - 0.5 - view.width);
    view.y = clamp(view.y, -0.5, size.height - 0.5 - view.height);
    this.svg.setAttribute("viewBox", `${view.x} ${view.y} ${view.width} ${view.height}`);
    this.svg.classList.toggle("zoomed", this.#isZoomed);
    this.#scaleMarks();
  }

  // A mark keeps its size on the screen; its disk is part of the image.
  #scaleMarks() {
    const place = (x, y) => `translate(${x} ${y}) scale(${1 / this.#scale})`;
    for (const mark of this.marks.children) mark.setAttribute("transform", place(mark.dataset.x, mark.dataset.y));
    this.cursorMark.setAttribute("transform", place(this.cursor.x, this.cursor.y));
  }

  // ---- The cursor of the arrow keys. A mouse hides it, and brings it to the place of the click.

  aim(value) {
    this.svg.classList.toggle("aiming", value);
    this.svg.focus({ preventScroll: true });
  }

  // Marks the cursor's place, or removes the point there. Nothing is marked at a place that isn't seen.
  mark() {
    if (this.svg.classList.contains("aiming")) this.#click(this.cursor);
    else this.aim(true);
  }

  step(target, dx, dy, isFine) {
    const by = isFine ? 1 : Math.max(1, Math.round(this.view.height / 40));
    if (target !== this.svg) {
      const { kind, index, x, y } = target.dataset;
      const point = this.#inside({ x: Number(x) + dx * by, y: Number(y) + dy * by });
      // A point's steps are one change.
      return this.events.move(kind, Number(index), point, `${kind} ${index}`);
    }
    this.aim(true);
    const [x, y] = this.#inside({ x: this.cursor.x + dx * by, y: this.cursor.y + dy * by });
    this.cursor = { x, y };
    const { view } = this;
    view.x = clamp(view.x, x - view.width * 0.95, x - view.width * 0.05);
    view.y = clamp(view.y, y - view.height * 0.95, y - view.height * 0.05);
    this.#show();
  }

  // A click marks a place, or removes the point there.
  #click(place) {
    const { x, y } = place;
    const { width, height } = this.size;
    const distance = ({ dataset }) => apart(place, { x: dataset.x, y: dataset.y }) * this.#scale;
    const [nearest] = [...this.marks.children].sort((a, b) => distance(a) - distance(b));
    if (nearest && distance(nearest) <= HANDLE) this.events.remove(nearest.dataset.kind, Number(nearest.dataset.index));
    else if (x >= -0.5 && y >= -0.5 && x < width - 0.5 && y < height - 0.5) this.events.mark(this.#inside(place));
  }

  #inside({ x, y }) {
    return [hundredths(clamp(x, 0, this.size.width - 1)), hundredths(clamp(y, 0, this.size.height - 1))];
  }

  // ---- Mouse, pen and fingers.

  #at({ x, y }) {
    return new DOMPoint(x, y).matrixTransform(this.svg.getScreenCTM().inverse());
  }

  #down(event) {
    if (event.button > 1) return;
    this.svg.classList.remove("aiming");
    this.svg.setPointerCapture(event.pointerId);
    this.pressed.set(event.pointerId, { x: event.x, y: event.y });
    const isOnly = this.pressed.size === 1;
    const mark = event.target.closest(".mark");
    this.press = isOnly && { from: event, at: this.#at(event), mark, isDrag: false };
  }

  #moved(event) {
    if (!this.pressed.has(event.pointerId)) return;
    const before = [...this.pressed.values()];
    this.pressed.set(event.pointerId, { x: event.x, y: event.y });
    if (before.length === 2) return this.#pinch(before, [...this.pressed.values()]);
    if (!this.press) return;
    this.press.isDrag ||= apart(event, this.press.from) > CLICK;
    if (this.press.isDrag) this.#drag(this.#at(event));
  }

  #up(event) {
    const ended = this.pressed.delete(event.pointerId) && this.press;
    this.press = null;
    if (!ended || event.button) return;
    const { kind, index } = ended.mark?.dataset ?? {};
    if (!ended.isDrag) {
      [this.cursor.x, this.cursor.y] = this.#inside(ended.at);
      this.#click(ended.at);
    }
    if (ended.isDrag && ended.mark) this.events.move(kind, Number(index), this.#inside(this.#at(event)));
  }

  #cancel(event) {
    this.pressed.delete(event.pointerId);
    this.press = null;
    this.events.cancel();
  }

  #drag({ x, y }) {
    const { mark, at } = this.press;
    if (!mark) return this.#pan(at.x - x, at.y - y);
    // Shows the point where it would be; the answer changes when it is let go.
    const disk = this.disks.children[[...this.marks.children].indexOf(mark)];
    disk.setAttribute("cx", x);
    disk.setAttribute("cy", y);
    Object.assign(mark.dataset, { x, y });
    this.#scaleMarks();
  }

  #pinch(before, after) {
    const [from, to] = [before, after].map(([a, b]) => ({ x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, apart: apart(a, b) }));
    const held = this.#at(from);
    this.zoom(to.apart / Math.max(from.apart, 1), held);
    const now = this.#at(to);
    this.#pan(held.x - now.x, held.y - now.y);
  }

  #wheel(event) {
    // Without Ctrl the page scrolls, or a zoomed image. A touchpad's pinch comes with Ctrl.
    if (event.ctrlKey) this.zoom(2 ** (-event.deltaY / 100), this.#at(event));
    else if (this.#isZoomed) this.#pan(event.deltaX / this.#scale, event.deltaY / this.#scale);
    else return;
    event.preventDefault();
  }
}
