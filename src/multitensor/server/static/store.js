// What the browser keeps: conversations (one entry each), settings, the theme. Nothing of it is sent anywhere.

const CONVERSATION = "multitensor.conversation.";
const SETTINGS = "multitensor.settings";
const KEY = "multitensor.key";

function read(storage, name) {
  try {
    return JSON.parse(storage().getItem(name));
  } catch {
    return null;
  }
}

const local = () => localStorage;
const session = () => sessionStorage;

export function newConversation(system = "") {
  return { id: crypto.getRandomValues(new Uint32Array(3)).join("-"), system, messages: [], updated: Date.now() };
}

/** Newest first. Entries that are no conversations (of a later version, or damaged) are left alone and not shown. */
export function loadConversations() {
  const found = [];
  try {
    for (let i = 0; i < localStorage.length; i++) {
      const name = localStorage.key(i);
      if (!name.startsWith(CONVERSATION)) continue;
      const entry = read(local, name);
      if (entry && Array.isArray(entry.messages) && entry.messages.every((m) => typeof m?.content === "string")) found.push(entry);
    }
  } catch {
    // storage is forbidden: conversations then live as long as the page
  }
  return found.sort((a, b) => b.updated - a.updated);
}

/** Returns whether it could be kept. */
export function saveConversation(conversation) {
  try {
    localStorage.setItem(CONVERSATION + conversation.id, JSON.stringify(conversation));
    return true;
  } catch {
    return false;
  }
}

export function deleteConversation(conversation) {
  try {
    localStorage.removeItem(CONVERSATION + conversation.id);
  } catch {
    // was never kept
  }
}

export function titleOf(conversation) {
  const first = conversation.messages.find((message) => message.role === "user");
  return first ? first.content.trim().split("\n")[0].slice(0, 80) : "New conversation";
}

export const loadSettings = () => read(local, SETTINGS) ?? {};

export function saveSettings(settings) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
  } catch {
    // they hold until the page is closed
  }
}

/** {key, remember}. Without `remember` the key is forgotten with the tab. */
export function loadKey() {
  const kept = read(local, KEY);
  return { key: kept ?? read(session, KEY) ?? "", remember: kept !== null };
}

export function saveKey(key, remember) {
  try {
    localStorage.removeItem(KEY);
    sessionStorage.removeItem(KEY);
    if (key) (remember ? localStorage : sessionStorage).setItem(KEY, JSON.stringify(key));
  } catch {
    // it holds until the page is closed
  }
}
