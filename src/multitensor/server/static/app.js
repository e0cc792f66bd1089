// The chat page: conversations, the message field, and what can be done with each message.

import { ApiError, getJson, streamChat } from "./api.js";
import { element, icon, update } from "./markdown.js";
import { Panel } from "./panel.js";
import * as store from "./store.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_completion_tokens", "seed"];
const NARROW = matchMedia("(max-width: 1099px)");

class Page {
  constructor() {
    this.conversations = store.loadConversations();
    this.settings = store.loadSettings();
    ({ key: this.key, remember: this.remember } = store.loadKey());
    this.current = this.conversations[0] ?? store.newConversation(this.settings.system ?? "");
    this.model = null;
    this.answering = null; // {controller, conversation, message, node}
    this.follow = true;
    this.panel = new Panel($("split"), {
      key: () => this.key,
      visible: () => !document.body.classList.contains("no-panel") && (!NARROW.matches || document.body.classList.contains("show-panel")),
      onState: (state) => this.showState(state),
    });
    document.body.classList.toggle("no-panel", this.settings.panel === false);
    this.listen();
    this.fillSettings();
    this.show(this.current);
    this.showPanelButton();
    this.panel.start();
    this.loadModel();
    if (!NARROW.matches) $("input").focus();
  }

  // --- the server ---

  async loadModel() {
    try {
      const { data } = await getJson("v1/models", this.key);
      this.model = data[0].id;
      $("model-name").textContent = this.model;
      document.title = this.model;
      this.notice(data[0].has_vocabulary === false ? "This model's file has no vocabulary, so it cannot chat." : "");
    } catch (error) {
      this.failed(error);
    }
  }

  showState(state) {
    $("dot").className = state === "ready" ? "ready" : "bad";
    $("model-state").textContent = state === "ready" ? "" : state;
    if (state === "ready" && this.model === null) this.loadModel();
  }

  notice(text) {
    $("notice").textContent = text;
    $("notice").hidden = !text;
  }

  failed(error) {
    if (error.status === 401) {
      this.openSettings(true);
      $("api-key").focus();
      this.notice(this.key ? "The server does not know this API key." : "This server asks for an API key: enter it in the settings.");
      return;
    }
    this.notice(error instanceof ApiError ? error.message : "The server cannot be reached.");
  }

  // --- conversations ---

  show(conversation) {
    this.current = conversation;
    $("system").value = conversation.system ?? "";
    this.follow = true;
    this.drawMessages();
    this.drawList();
    this.showBusy();
  }

  start() {
    this.show(store.newConversation(this.current.system));
    this.closeDrawers();
    $("input").focus();
  }

  remove(conversation) {
    if (!confirm(`Delete "${store.titleOf(conversation)}"?`)) return;
    if (this.answering?.conversation === conversation) this.stop();
    store.deleteConversation(conversation);
    this.conversations = this.conversations.filter((each) => each !== conversation);
    if (this.current === conversation) this.show(this.conversations[0] ?? store.newConversation());
    else this.drawList();
  }

  keep(conversation) {
    conversation.updated = Date.now();
    this.conversations = [conversation, ...this.conversations.filter((each) => each !== conversation)];
    if (!store.saveConversation(conversation)) this.notice("The browser's storage is full or closed: this conversation is lost with this page. Deleting old ones helps.");
    this.drawList();
  }

  drawList() {
    $("conversations").replaceChildren(
      ...this.conversations.map((conversation) => {
        const title = store.titleOf(conversation);
        const open = element("button", "open", title);
        open.title = title;
        if (conversation === this.current) open.setAttribute("aria-current", "true");
        open.onclick = () => {
          this.show(conversation);
          this.closeDrawers();
        };
        const bin = element("button", "icon", icon("bin"));
        bin.setAttribute("aria-label", `Delete ${title}`);
        bin.onclick = () => this.remove(conversation);
        return element("li", "", open, bin);
      }),
    );
  }

  // --- messages ---

  drawMessages() {
    const { messages } = this.current;
    $("empty").hidden = messages.length > 0;
    $("messages").replaceChildren(...messages.map((message) => this.messageNode(message)));
    if (this.answering?.conversation === this.current) this.answering.node = $("messages").lastElementChild;
    this.scroll();
  }

  messageNode(message) {
    const node = element("li", `message ${message.role}`);
    node.setAttribute("aria-label", message.role === "user" ? "You" : "Answer");
    this.fill(node, message);
    return node;
  }

  /** Draws a message, or draws it again after it grew. */
  fill(node, message) {
    const busy = this.answering?.message === message;
    node.toggleAttribute("aria-busy", busy);
    node.classList.toggle("busy", busy);
    if (!node.body) {
      node.body = element("div", "body");
      node.append(node.body);
    }
    if (message.role === "user") {
      node.body.textContent = message.content;
    } else {
      this.fillThoughts(node, message, busy);
      update(node.body, message.content);
    }
    node.foot?.remove();
    node.foot = busy ? null : this.foot(node, message);
    if (node.foot) node.append(node.foot);
  }

  fillThoughts(node, message, busy) {
    if (!message.reasoning) return;
    if (!node.thoughts) {
      node.thoughts = element("details", "thoughts", element("summary"), element("div", "body"));
      node.prepend(node.thoughts);
    }
    node.thoughts.firstChild.textContent = busy && !message.content ? "Thinking..." : "Thoughts";
    update(node.thoughts.lastChild, message.reasoning);
  }

  foot(node, message) {
    const foot = element("div", "foot");
    if (message.error) foot.append(element("p", "error", message.error));
    const action = (name, label, run) => {
      const button = element("button", "icon", icon(name));
      button.title = label;
      button.setAttribute("aria-label", label);
      button.onclick = () => run(button);
      foot.append(button);
    };
    action("copy", "Copy", (button) => copyText(message.content, button));
    if (message.role === "user") action("edit", "Edit and ask again", () => this.edit(node, message));
    else action("again", "Answer again", () => this.regenerate(message));
    const facts = [];
    if (message.tokens) facts.push(`${message.tokens} tokens`);
    if (message.rate) facts.push(`${message.rate.toFixed(1)} a second`);
    if (message.first) facts.push(`first after ${message.first.toFixed(2)} s`);
    if (message.ended === "length") facts.push("cut at its longest length");
    if (message.ended === "stopped") facts.push("stopped");
    if (facts.length) foot.append(element("span", "facts", facts.join(", ")));
    return foot;
  }

  edit(node, message) {
    if (this.answering) return; // one answer at a time, in whatever conversation
    const field = element("textarea");
    field.value = message.content;
    field.setAttribute("aria-label", "Edit the message");
    const done = () => this.drawMessages();
    const save = () => {
      if (!field.value.trim() || this.answering) return;
      const at = this.current.messages.indexOf(message);
      this.current.messages.length = at;
      this.ask(field.value);
    };
    const send = element("button", "primary", "Send");
    const cancel = element("button", "plain", "Cancel");
    send.onclick = save;
    cancel.onclick = done;
    field.onkeydown = (event) => {
      if (isEnter(event)) save();
      else if (event.key === "Escape") done();
      else return;
      event.preventDefault();
      event.stopPropagation();
    };
    field.oninput = () => grow(field);
    node.replaceChildren(element("div", "editor", field, element("div", "buttons", cancel, send)));
    grow(field);
    field.focus();
  }

  // --- asking ---

  ask(text) {
    this.current.messages.push({ role: "user", content: text });
    this.answer();
  }

  regenerate(message) {
    if (this.answering) return;
    this.current.messages.length = this.current.messages.indexOf(message);
    this.answer();
  }

  request(conversation) {
    const messages = [];
    for (const { role, content } of conversation.messages) {
      if (role !== "user" && !content) continue; // an answer that failed
      // Many templates want roles to alternate, so questions that were never answered are asked together.
      if (messages.at(-1)?.role === role) messages.at(-1).content += `\n\n${content}`;
      else messages.push({ role, content });
    }
    if (conversation.system.trim()) messages.unshift({ role: "system", content: conversation.system });
    const body = { messages };
    if (this.model !== null) body.model = this.model;
    for (const name of NUMBERS) if (typeof this.settings[name] === "number") body[name] = this.settings[name];
    if (this.settings.stop) body.stop = this.settings.stop;
    return body;
  }

  async answer() {
    const conversation = this.current;
    const body = this.request(conversation);
    const message = { role: "assistant", content: "" };
    conversation.messages.push(message);
    const run = (this.answering = { controller: new AbortController(), conversation, message, node: null });
    this.notice("");
    this.follow = true;
    this.keep(conversation);
    this.drawMessages();
    this.showBusy();
    const started = performance.now();
    let first = null;
    let pending = 0;
    const draw = () => {
      pending = 0;
      if (run.node?.isConnected) {
        this.fill(run.node, message);
        this.scroll();
      }
    };
    try {
      for await (const chunk of streamChat(body, this.key, run.controller.signal)) {
        const [choice] = chunk.choices;
        const { content, reasoning_content: reasoning } = choice?.delta ?? {};
        if ((content || reasoning) && first === null) first = performance.now();
        if (content) message.content += content;
        if (reasoning) message.reasoning = (message.reasoning ?? "") + reasoning;
        if (choice?.finish_reason) message.ended = choice.finish_reason;
        if (chunk.usage) message.tokens = chunk.usage.completion_tokens;
        pending ||= requestAnimationFrame(draw); // as often as the screen can show it, however fast tokens come
      }
    } catch (error) {
      if (error.name === "AbortError") message.ended = "stopped";
      else this.answerFailed(error, message);
    }
    cancelAnimationFrame(pending);
    if (first !== null) {
      message.first = (first - started) / 1000;
      const seconds = (performance.now() - first) / 1000;
      if (message.tokens > 1 && seconds > 0.05) message.rate = (message.tokens - 1) / seconds;
    }
    if (this.answering === run) this.answering = null;
    if (this.conversations.includes(conversation)) this.keep(conversation); // else it was deleted meanwhile
    draw();
    this.showBusy();
  }

  answerFailed(error, message) {
    message.error = error instanceof ApiError ? error.message : "The connection to the server was lost.";
    if (error.status === 401) this.failed(error);
  }

  stop() {
    this.answering?.controller.abort();
  }

  showBusy() {
    const busy = this.answering !== null;
    $("send").hidden = busy;
    $("stop").hidden = !busy;
  }

  send() {
    const text = $("input").value;
    if (!text.trim() || this.answering) return;
    $("input").value = "";
    grow($("input"));
    this.ask(text);
    this.closeDrawers();
  }

  // --- settings ---

  fillSettings() {
    for (const name of NUMBERS) $(`s-${name}`).value = this.settings[name] ?? "";
    $("s-stop").value = this.settings.stop ?? "";
    $("api-key").value = this.key;
    $("remember-key").checked = this.remember;
  }

  takeSettings() {
    for (const name of NUMBERS) {
      const field = $(`s-${name}`);
      const value = field.valueAsNumber;
      const wrong = isWrong(field);
      field.setAttribute("aria-invalid", String(wrong));
      if (Number.isNaN(value) || wrong) delete this.settings[name];
      else this.settings[name] = value;
    }
    this.settings.stop = $("s-stop").value;
    this.current.system = this.settings.system = $("system").value;
    store.saveSettings(this.settings);
    if (this.current.messages.length) store.saveConversation(this.current);
  }

  takeKey() {
    const [key, remember] = [$("api-key").value.trim(), $("remember-key").checked];
    if (key === this.key && remember === this.remember) return;
    [this.key, this.remember] = [key, remember];
    store.saveKey(key, remember);
    this.loadModel();
    this.panel.refresh();
  }

  openSettings(open) {
    $("settings").hidden = !open;
    $("toggle-settings").setAttribute("aria-expanded", String(open));
    this.shade();
  }

  togglePanel() {
    if (NARROW.matches) {
      document.body.classList.toggle("show-panel");
    } else {
      this.settings.panel = document.body.classList.contains("no-panel");
      document.body.classList.toggle("no-panel", !this.settings.panel);
      store.saveSettings(this.settings);
    }
    this.showPanelButton();
    this.panel.refresh();
  }

  showPanelButton() {
    $("toggle-panel").setAttribute("aria-expanded", String(this.panel.visible()));
    this.shade();
  }

  closeDrawers() {
    document.body.classList.remove("show-sidebar", "show-panel");
    this.showPanelButton();
    this.openSettings(false);
  }

  shade() {
    const { classList } = document.body;
    $("shade").hidden = !(classList.contains("show-sidebar") || classList.contains("show-panel") || !$("settings").hidden);
  }

  // --- scrolling ---

  scroll() {
    if (this.follow) $("scroll").scrollTop = $("scroll").scrollHeight;
    this.noteScroll();
  }

  noteScroll() {
    const area = $("scroll");
    $("to-end").hidden = area.scrollHeight - area.scrollTop - area.clientHeight < 80;
  }

  // --- events ---

  listen() {
    $("composer").onsubmit = (event) => {
      event.preventDefault();
      this.send();
    };
    $("input").oninput = () => grow($("input"));
    $("input").onkeydown = (event) => this.inputKey(event);
    $("stop").onclick = () => this.stop();
    $("new").onclick = () => this.start();
    $("open-sidebar").onclick = () => {
      document.body.classList.add("show-sidebar");
      this.shade();
    };
    $("shade").onclick = () => this.closeDrawers();
    $("toggle-panel").onclick = () => this.togglePanel();
    $("panel").querySelector(".close").onclick = () => this.togglePanel();
    $("toggle-settings").onclick = () => this.openSettings($("settings").hidden);
    $("settings").querySelector(".close").onclick = () => this.openSettings(false);
    $("settings-form").oninput = () => this.takeSettings();
    $("settings-form").onchange = () => this.takeKey();
    $("settings-form").onsubmit = (event) => event.preventDefault();
    $("settings-form").onreset = (event) => {
      event.preventDefault();
      for (const name of [...NUMBERS, "stop"]) $(`s-${name}`).value = "";
      this.takeSettings();
    };
    $("toggle-theme").onclick = toggleTheme;
    $("to-end").onclick = () => {
      this.follow = true;
      this.scroll();
    };
    $("scroll").addEventListener("scroll", () => this.noteScroll(), { passive: true });
    // Only a hand on the wheel, the screen or the keys stops the text from being followed; growing text does not.
    for (const name of ["wheel", "touchmove", "keydown", "pointerdown"]) {
      $("scroll").addEventListener(name, () => requestAnimationFrame(() => {
        this.noteScroll();
        this.follow = $("to-end").hidden;
      }), { passive: true });
    }
    $("messages").addEventListener("click", (event) => {
      const button = event.target.closest(".code .copy");
      if (button) copyText(button.closest(".code").querySelector("code").textContent, button);
    });
    document.addEventListener("keydown", (event) => this.pageKey(event));
    NARROW.addEventListener("change", () => this.showPanelButton());
  }

  inputKey(event) {
    if (isEnter(event)) {
      event.preventDefault();
      this.send();
    } else if (event.key === "ArrowUp" && !$("input").value && !this.answering) {
      const nodes = [...$("messages").querySelectorAll(".user")];
      nodes.at(-1)?.querySelector('[aria-label="Edit and ask again"]')?.click();
      event.preventDefault();
    }
  }

  pageKey(event) {
    const typing = event.target.matches("input, textarea");
    if (event.key === "Escape") {
      if (!$("shade").hidden || !$("settings").hidden) this.closeDrawers();
      else this.stop();
    } else if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      $("input").focus();
    } else if (event.altKey && event.code === "KeyN") {
      event.preventDefault();
      this.start();
    }
  }
}

/** Enter alone; not the one that ends the composition of a character. */
function isEnter(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}

/** Whether a number cannot be used. The step is what the arrows add: only whole numbers must be a multiple of it. */
function isWrong({ validity, step }) {
  return validity.badInput || validity.rangeUnderflow || validity.rangeOverflow || (step === "1" && validity.stepMismatch);
}

function grow(field) {
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight + 2, innerHeight * 0.4)}px`;
}

async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without TLS a browser has no clipboard but the old one.
    const field = element("textarea", "offscreen");
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    button.focus();
  }
  const picture = button.querySelector("use");
  picture.setAttribute("href", "#i-check");
  setTimeout(() => picture.setAttribute("href", "#i-copy"), 1500);
}

function toggleTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try {
    localStorage.setItem("multitensor.theme", root.dataset.theme);
  } catch {
    // it holds until the page is closed
  }
}

new Page();
