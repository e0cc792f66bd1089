// Markdown to DOM nodes. Text only ever becomes text nodes, so nothing a model says can become markup or script.

const MAX_DEPTH = 12;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const ITEM = /^(\s*)(?:([-*+])|(\d{1,9})[.)])(?:\s+(.*)|)$/;
const TABLE_RULE = /^ {0,3}\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;

/** An element with a class and children (nodes or strings). */
export function element(tag, className = "", ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** Draws `text` into `target` again, touching only the blocks that changed: a stream grows at its end. */
export function update(target, text) {
  const blocks = split(text.replaceAll("\r\n", "\n").split("\n"));
  const known = target.blocks ?? [];
  const keys = blocks.map((block) => `${block.kind}\n${block.lines.join("\n")}\n${block.open ?? ""}`);
  let same = 0;
  while (same < keys.length && same < known.length && keys[same] === known[same]) same++;
  const last = blocks[same];
  // A code block that only grew keeps its element, so that its scroll position and a selection in it stay.
  if (last?.kind === "code" && same === keys.length - 1 && target.children[same]?.matches(".code") && same === known.length - 1) {
    target.children[same].querySelector("code").textContent = code(last.lines);
    target.children[same].querySelector(".lang").textContent = last.info || "text";
  } else {
    while (target.children.length > same) target.lastChild.remove();
    target.append(...blocks.slice(same).map((block) => draw(block, 0)));
  }
  target.blocks = keys;
}

/** Lines to blocks: {kind, lines}, in order, every line in exactly one block or blank between blocks. */
function split(lines) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    if (!line.trim()) {
      at++;
      continue;
    }
    const fence = FENCE.exec(line);
    let end = at + 1;
    if (fence) {
      const mark = fence[1];
      const closes = (l) => l.trim().startsWith(mark) && !l.trim().replaceAll(mark[0], "");
      while (end < lines.length && !closes(lines[end])) end++;
      blocks.push({ kind: "code", info: fence[2], lines: lines.slice(at + 1, end), open: end >= lines.length });
      at = end + 1;
      continue;
    }
    let kind = "paragraph";
    if (HEADING.test(line)) kind = "heading";
    else if (RULE.test(line)) kind = "rule";
    else if (QUOTE.test(line)) {
      kind = "quote";
      while (end < lines.length && QUOTE.test(lines[end])) end++;
    } else if (ITEM.test(line)) {
      kind = "list";
      while (end < lines.length && inList(lines, end)) end++;
    } else if (line.includes("|") && TABLE_RULE.test(lines[at + 1] ?? "") && lines[at + 1].includes("-")) {
      kind = "table";
      while (end < lines.length && lines[end].includes("|")) end++;
    } else {
      while (end < lines.length && lines[end].trim() && !interrupts(lines, end)) end++;
    }
    blocks.push({ kind, lines: lines.slice(at, end) });
    at = end;
  }
  return blocks;
}

function interrupts(lines, at) {
  const line = lines[at];
  const item = ITEM.exec(line);
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || (item && item[4] !== undefined);
}

/** Whether a line still belongs to the list that began above it. */
function inList(lines, at) {
  const line = lines[at];
  if (line.trim()) {
    if (ITEM.test(line) && !RULE.test(line)) return true;
    return /^\s{2,}/.test(line) || (lines[at - 1].trim() !== "" && !interrupts(lines, at));
  }
  let next = at + 1;
  while (next < lines.length && !lines[next].trim()) next++;
  return next < lines.length && (/^\s{2,}/.test(lines[next]) || (ITEM.test(lines[next]) && !RULE.test(lines[next])));
}

function draw(block, depth) {
  const { kind, lines } = block;
  if (kind === "code") return codeBlock(block.info, code(lines));
  if (depth > MAX_DEPTH) return element("p", "", lines.join("\n"));
  if (kind === "rule") return element("hr");
  if (kind === "heading") {
    const [, marks, text] = HEADING.exec(lines[0]);
    return element(`h${Math.min(6, marks.length + 2)}`, "", ...inline(text));
  }
  if (kind === "quote") return element("blockquote", "", ...nested(lines.map((line) => QUOTE.exec(line)[1]), depth));
  if (kind === "list") return list(lines, depth);
  if (kind === "table") return table(lines);
  return element("p", "", ...inline(lines.map((line) => line.trimStart()).join("\n")));
}

const nested = (lines, depth) => split(lines).map((block) => draw(block, depth + 1));
const code = (lines) => lines.join("\n");

function list(lines, depth) {
  const first = ITEM.exec(lines[0]);
  const indent = first[1].length;
  const node = element(first[3] === undefined ? "ul" : "ol");
  if (first[3] !== undefined && first[3] !== "1") node.start = Number(first[3]);
  let item = null;
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (found && found[1].length <= indent + 1) {
      item = [found[4] ?? ""];
      node.append(item.node = element("li"));
      item.node.source = item;
      item.width = line.length - line.trimStart().length + (found[2] ?? found[3] + ".").length + 1;
    } else {
      const cut = Math.min(item.width, line.length - line.trimStart().length);
      item.push(line.slice(cut));
    }
  }
  for (const child of node.children) {
    const blocks = split(child.source);
    delete child.source;
    const drawn = blocks.map((block) => draw(block, depth + 1));
    // A one-line item is text, not a paragraph: lists stay tight.
    if (blocks[0]?.kind === "paragraph") drawn.splice(0, 1, ...drawn[0].childNodes);
    child.append(...drawn);
  }
  return node;
}

function table(lines) {
  const rows = lines.map(cells);
  const align = rows[1].map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : ""));
  const row = (tag, values) =>
    element("tr", "", ...rows[0].map((_, i) => element(tag, align[i] ?? "", ...inline(values[i] ?? ""))));
  const node = element("table", "", element("thead", "", row("th", rows[0])));
  node.append(element("tbody", "", ...rows.slice(2).map((values) => row("td", values))));
  return element("div", "table", node);
}

function cells(line) {
  const text = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return text.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function codeBlock(info, text) {
  const copy = element("button", "copy", icon("copy"), "Copy");
  copy.type = "button";
  copy.setAttribute("aria-label", "Copy this code");
  const head = element("div", "code-head", element("span", "lang", info || "text"), copy);
  return element("div", "code", head, element("pre", "", element("code", "", text)));
}

// One alternative each: escape, code span, link or image, bold, italic, strike, address, line break. None can match in
// more than one way, so there is no catastrophic input.
const INLINE = new RegExp(
  [
    /\\([\\`*_{}[\]()#+\-.!|~<>])/,
    /(`{1,20})((?:[^`]|(?!\2)`){1,2000}?)(?<!`)\2(?!`)/,
    /!?\[([^[\]\n]{1,500})\]\(<?([^\s()<>]{1,2000}(?:\([^\s()<>]{0,500}\)[^\s()<>]{0,500})?)>?(?:\s+"[^"\n]{0,300}")?\)/,
    /\*\*(?=\S)([^\n]{1,4000}?\S)\*\*|__(?=\S)([^\n]{1,4000}?\S)__(?!\w)/,
    /\*(?![\s*])([^*\n]{0,4000}[^\s*])\*|(?<!\w)_(?![\s_])([^_\n]{0,4000}[^\s_])_(?!\w)/,
    /~~(?=\S)([^~\n]{1,4000})~~/,
    /(https?:\/\/[^\s<>"'`()[\]{}]{1,2000}[^\s<>"'`()[\]{}.,;:!?*_])/,
    /(\n)/,
  ]
    .map((part) => part.source)
    .join("|"),
);

/** Inline Markdown to an array of nodes and strings. */
function inline(text, depth = 0) {
  const out = [];
  let rest = text;
  while (rest) {
    const found = depth > MAX_DEPTH ? null : INLINE.exec(rest);
    if (!found) {
      out.push(rest);
      break;
    }
    if (found.index) out.push(rest.slice(0, found.index));
    out.push(span(found, depth));
    rest = rest.slice(found.index + found[0].length);
  }
  return out;
}

function span(found, depth) {
  const [whole, escaped, , codeText, label, target, bold, bold2, italic, italic2, struck, address, lineBreak] = found;
  const inner = (tag, text) => element(tag, "", ...inline(text, depth + 1));
  if (escaped !== undefined) return escaped;
  if (codeText !== undefined) return element("code", "", codeText.replace(/^ (.*\S.*) $/, "$1"));
  if (label !== undefined) return link(target, label, whole, depth);
  if ((bold ?? bold2) !== undefined) return inner("strong", bold ?? bold2);
  if ((italic ?? italic2) !== undefined) return inner("em", italic ?? italic2);
  if (struck !== undefined) return inner("s", struck);
  if (address !== undefined) return link(address, null, whole, depth);
  return lineBreak === undefined ? whole : element("br");
}

/** A link if it leads to the web or a mail address; else the text as it was written. Pictures are links too: showing
 * one would tell its server that somebody reads this. */
function link(target, label, whole, depth) {
  let url;
  try {
    url = new URL(target);
  } catch {
    return whole;
  }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return whole;
  const node = label === null ? element("a", "", target) : element("a", "", ...inline(label, depth + 1));
  node.href = url.href;
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
  return node;
}
