// The side panel: which device holds and does how much, read from /v1/plan once and /v1/stats every second.

import { getJson } from "./api.js";
import { element } from "./markdown.js";

const PERIOD = 1000;
const HISTORY = 60;
const COLOURS = 8; // c0 to c7 in style.css

export function bytes(count) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (Math.abs(count) < 1024) return `${unit === "B" ? count : count.toFixed(count < 10 ? 1 : 0)} ${unit}`;
    count /= 1024;
  }
  return `${count.toFixed(1)} TiB`;
}

const percent = (share) => `${(share * 100).toFixed(share < 0.1 ? 1 : 0)}%`;

/** A bar of parts [{share, className, title}], shares of its whole width. */
function bar(parts, label) {
  const node = element("div", "bar");
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", label);
  for (const { share, className, title } of parts) {
    const part = element("span", className);
    part.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
    part.title = title ?? "";
    node.append(part);
  }
  return node;
}

function row(name, value, ...more) {
  return element("div", "row", element("span", "", name), element("span", "value", value), ...more);
}

function sparkline(values) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  const top = Math.max(1, ...values);
  const points = values.map((v, i) => `${(((i + HISTORY - values.length) / (HISTORY - 1)) * 100).toFixed(1)},${(30 - (v / top) * 27).toFixed(1)}`);
  svg.setAttribute("viewBox", "0 0 100 32");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("class", "spark");
  svg.setAttribute("aria-hidden", "true");
  line.setAttribute("points", points.join(" "));
  svg.append(line);
  return svg;
}

export class Panel {
  /** visible: () => whether anybody sees it. onState: told ("ready" | "not ready" | "unreachable"). */
  constructor(target, { key, visible, onState }) {
    this.target = target;
    this.key = key;
    this.visible = visible;
    this.onState = onState;
    this.plan = null;
    this.history = [];
    this.previous = null;
  }

  start() {
    const tick = async () => {
      await this.refresh();
      setTimeout(tick, this.visible() ? PERIOD : PERIOD * 5);
    };
    tick();
  }

  async refresh() {
    if (document.hidden) return;
    try {
      const signal = AbortSignal.timeout(10_000);
      this.plan ??= await getJson("v1/plan?tensors=false", this.key(), signal);
      const stats = await getJson("v1/stats", this.key(), signal);
      this.history = [...this.history, stats.tokens_per_second].slice(-HISTORY);
      this.onState(stats.ready ? "ready" : "not ready");
      if (this.visible()) this.draw(stats);
      this.previous = stats;
    } catch (error) {
      const state = error.status === 401 || error.status === 403 ? "needs a key" : error.status ? "not ready" : "unreachable";
      this.onState(state);
      this.target.replaceChildren(element("p", "note", error.status ? error.message : "The server cannot be reached."));
    }
  }

  draw(stats) {
    const plan = this.plan;
    const rate = stats.tokens_per_second;
    const devices = stats.devices;
    const shares = devices.map((d) => ({ share: d.share, className: `c${d.rank % COLOURS}`, title: `${d.name}: ${percent(d.share)} of the weights` }));
    const ranks = devices.length === 1 ? "one device" : `${devices.length} devices`;
    this.target.replaceChildren(
      element("div", "rate", element("b", "", rate.toFixed(rate < 100 ? 1 : 0)), element("span", "", "tokens a second"), sparkline(this.history)),
      element(
        "section",
        "",
        element("p", "caption", `${plan.architecture}, ${plan.dtype}, cut over ${ranks}`),
        bar(shares, shares.map((s) => s.title).join("; ")),
      ),
      ...devices.map((device) => this.device(device)),
      element(
        "section",
        "",
        row("Answering", String(stats.running)),
        row("Waiting", String(stats.waiting)),
        row("KV cache", `${stats.kv_used.toLocaleString("en")} of ${stats.kv_total.toLocaleString("en")} tokens`, bar([{ share: stats.kv_total ? stats.kv_used / stats.kv_total : 0, className: "fill" }], "KV cache in use")),
        row("Prompt tokens reused", stats.prefix_queries ? percent(stats.prefix_hits / stats.prefix_queries) : "none yet"),
        row("Context", `${stats.context.toLocaleString("en")} tokens`),
        row("KV type", plan.kv_type),
      ),
    );
  }

  device(d) {
    const whole = Math.max(d.capacity_bytes, d.held_bytes) || 1;
    const colour = `c${d.rank % COLOURS}`;
    const held = bar(
      [
        { share: d.weights_bytes / whole, className: colour, title: `weights ${bytes(d.weights_bytes)}` },
        { share: d.kv_bytes / whole, className: `${colour} kv`, title: `KV cache ${bytes(d.kv_bytes)}` },
        { share: d.buffers_bytes / whole, className: `${colour} rest`, title: `buffers ${bytes(d.buffers_bytes)}` },
      ],
      `holds ${bytes(d.held_bytes)} of ${bytes(d.capacity_bytes)}`,
    );
    const head = element("div", "device-head", element("span", `swatch ${colour}`), element("b", "", d.name), element("span", "value", percent(d.share)));
    const card = element("section", "device", head);
    if (d.description) card.append(element("p", "caption", d.description));
    card.append(row("Holds", `${bytes(d.held_bytes)} of ${bytes(d.capacity_bytes)}`, held));
    card.append(element("p", "caption", `weights ${bytes(d.weights_bytes)}, KV ${bytes(d.kv_bytes)}, buffers ${bytes(d.buffers_bytes)}`));
    if (d.load !== null) card.append(row("Load", percent(d.load), bar([{ share: d.load, className: colour }], `load ${percent(d.load)}`)));
    if (d.memory_used !== null) card.append(row(d.name.startsWith("cpu") ? "Machine's memory" : "Memory in use", `${bytes(d.memory_used)} of ${bytes(d.memory_total)}`));
    if (d.power !== null) card.append(row("Power", `${d.power.toFixed(0)} W${d.temperature === null ? "" : `, ${d.temperature} °C`}`));
    const waits = this.reductions(d);
    if (waits !== null) card.append(row("In reductions", percent(waits)));
    return card;
  }

  /** Share of a rank's time since the last look that went into reductions; null when it is not measured. */
  reductions(d) {
    const before = this.previous?.devices[d.rank];
    if (!before || d.compute_seconds === null || d.reduction_seconds === null) return null;
    const compute = d.compute_seconds - before.compute_seconds;
    const reduction = d.reduction_seconds - before.reduction_seconds;
    return compute + reduction > 0 ? reduction / (compute + reduction) : null;
  }
}
