// Making elements. Text only ever becomes text nodes: answers and file names are never markup.

/**
 * An element with attributes, listeners (`on*`) and children.
 * @param {string} tag
 * @param {Record<string, any>} [properties]
 * @param {...(Node | string | number)} children
 */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, String(value));
  }
  element.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

/** The element with an id. */
export const byId = (id) => document.getElementById(id);

/** A table; the first cell of a row is its header. */
export function table(caption, columns, rows) {
  const heads = columns.map((name) => make("th", { scope: "col" }, name));
  const lines = rows.map(([first, ...others]) => {
    const cells = others.map((cell) => make("td", {}, cell));
    return make("tr", {}, make("th", { scope: "row" }, first), ...cells);
  });
  return make(
    "table",
    {},
    make("caption", {}, caption),
    make("thead", {}, make("tr", {}, ...heads)),
    make("tbody", {}, ...lines),
  );
}

/** Colours of the style sheet, for what is drawn; they follow the light or dark scheme. */
export function colours() {
  const style = getComputedStyle(document.documentElement);
  return new Proxy({}, { get: (_, name) => style.getPropertyValue(`--${String(name)}`).trim() });
}

/** Prepare a canvas for drawing in CSS pixels; its element keeps its size on the page. */
export function context2d(canvas, width, height) {
  const scale = Math.min(window.devicePixelRatio || 1, 2);
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  return context;
}
