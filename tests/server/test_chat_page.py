"""The chat page in headless Chromium, over a fake API; skipped where there is no Chromium or no playwright."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fake_api import FakeApi
from serving import serve

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
TIMEOUT = 10_000

MARKDOWN = """# Cutting a matrix

Each device holds **its own columns** of `W`, so *nothing* is copied twice:

1. multiply the part at hand,
2. add the partial sums
   - in rank order, always
   - over the cheapest link
3. go on

```python
def cut(total: int, shares: list[float]) -> list[int]:
    return [round(total * share) for share in shares]
```

| device | share | tokens a second |
|---|---:|:---:|
| RTX 4090 | 50% | 83 |
| RTX 3090 | 30% | 83 |

> A tensor that cannot be cut is held whole, and the plan says so.

See [the plan](https://example.org/plan_(1)) or https://example.org/a_b_c. A snake_case_name stays, 2 * 3 * 4 too.
"""

XSS = [
    "<script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    "<svg/onload=window.pwned=1>",
    "[click](javascript:window.pwned=1)",
    "[click](  java\tscript:window.pwned=1)",
    "[click](data:text/html,<script>parent.pwned=1</script>)",
    "[click](vbscript:x)",
    '![x](x" onerror="window.pwned=1)',
    '[x](https://example.org/"onmouseover="window.pwned=1)',
    'https://example.org/"><img/src/onerror=window.pwned=1>',
    "```<img src=x onerror=window.pwned=1>\n<script>window.pwned=1</script>\n```",
    "`<b onclick=window.pwned=1>`",
    "# <iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "| <a href=javascript:window.pwned=1>x</a> |\n|---|\n| <style>*{display:none}</style> |",
    "> <form action=javascript:window.pwned=1><button>x</button></form>",
    '<a href="javascript:window.pwned=1">x</a> &lt;script&gt; &#x3c;script&#x3e;',
    "**<body onload=window.pwned=1>** __proto__ constructor",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install playwright")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[FakeApi, str]]:
    api = FakeApi()
    with serve(api.app) as port:
        yield api, f"http://127.0.0.1:{port}/"


@pytest.fixture
def api(server: tuple[FakeApi, str]) -> FakeApi:
    server[0].reset()
    return server[0]


@pytest.fixture(scope="module")
def tab(browser: Any, server: tuple[FakeApi, str]) -> Iterator[tuple[Any, list[str]]]:
    """One tab for all tests (a new one takes a second), and what went wrong in it: scripts that threw, broken
    policies, requests to anywhere else."""
    context = browser.new_context(viewport={"width": 1400, "height": 850}, reduced_motion="reduce")
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(TIMEOUT)
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda entry: troubles.append(entry.text) if entry.type == "error" else None)
    page.on("request", lambda r: None if r.url.startswith((server[1], "data:")) else troubles.append(r.url))
    page.on("dialog", lambda dialog: dialog.accept())
    yield page, troubles
    context.close()


@pytest.fixture
def page(tab: tuple[Any, list[str]], api: FakeApi, server: tuple[FakeApi, str]) -> Iterator[Any]:
    """The page as somebody sees it who comes for the first time."""
    page, troubles = tab
    page.goto(server[1] + "static/icon.svg")
    page.evaluate("() => { localStorage.clear(); sessionStorage.clear(); }")
    page.goto(server[1])
    page.locator("#dot.ready").wait_for()
    troubles.clear()
    yield page
    expected = ("status of 401", "status of 400", "ERR_INCOMPLETE")  # the browser's own words for failed requests
    assert [trouble for trouble in troubles if not any(words in trouble for words in expected)] == []


def ask(page: Any, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def answer(page: Any, number: int = 0) -> Any:
    """The body of an answer that is complete."""
    message = page.locator(".message.assistant").nth(number)
    message.locator(".foot").wait_for()
    return message.locator("> .body")


def shoot(page: Any, name: str) -> None:
    """Pictures for people, where a folder is named for them."""
    folder = os.environ.get("MULTITENSOR_SCREENSHOTS")
    if folder:
        page.screenshot(path=f"{folder}/{name}.png")


# --- without a browser ---


def test_the_page_comes_with_a_strict_policy_and_asks_for_nothing_outside(server: tuple[FakeApi, str]) -> None:
    index = httpx.get(server[1])
    assert index.status_code == 200
    policy = index.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", index.text)
    assert not re.search(r"<script(?![^>]*\bsrc=)|\bstyle=|\son\w+=", index.text), "inline scripts and styles"
    for name in re.findall(r"(?:src|href)=\"(static/[^\"]+)\"", index.text):
        asset = httpx.get(server[1] + name)
        assert asset.status_code == 200 and asset.headers["x-content-type-options"] == "nosniff"
        again = httpx.get(server[1] + name, headers={"If-None-Match": asset.headers["etag"]})
        assert again.status_code == 304 and again.content == b""
        assert not re.search(r"https?://(?!www\.w3\.org/(?:2000/svg|1999))", asset.text), name
    for path in ("static/../auth.py", "static/%2e%2e/auth.py", "static/none.js"):
        assert httpx.get(server[1] + path).status_code == 404


# --- answers ---


def test_a_streamed_answer_with_its_figures(page: Any, api: FakeApi) -> None:
    api.reply = "Streams: äöü 🙂 日本語."
    ask(page, "Say something\nin two lines")
    assert answer(page).inner_text() == api.reply
    body = api.bodies[0]
    assert body["messages"] == [{"role": "user", "content": "Say something\nin two lines"}]
    assert body["model"] == "llama-3-70b-q4_k_m" and body["stream"] is True
    assert not {"temperature", "top_p", "seed", "stop"} & body.keys(), "empty fields are left to the server"
    assert re.search(r"\d+ tokens", page.locator(".assistant .facts").inner_text())
    assert page.locator("#send").is_visible() and not page.locator("#stop").is_visible()


def test_markdown(page: Any, api: FakeApi) -> None:
    api.reply = MARKDOWN
    ask(page, "How is a matrix cut?")
    body = answer(page)
    assert body.locator("h3").inner_text() == "Cutting a matrix"
    assert body.locator("strong").inner_text() == "its own columns"
    assert body.locator("p em").inner_text() == "nothing"
    assert body.locator("> ol > li").count() == 3 and body.locator("> ol > li > ul > li").count() == 2
    assert body.locator(".code .lang").inner_text() == "python"
    assert "    return [round" in body.locator("pre code").inner_text()
    assert body.locator("tbody tr").count() == 2 and body.locator("td.right").count() == 2
    assert "held whole" in body.locator("blockquote").inner_text()
    links = body.locator("a")
    assert [links.nth(i).get_attribute("href") for i in range(2)] == [
        "https://example.org/plan_(1)",
        "https://example.org/a_b_c",
    ]
    assert links.first.get_attribute("rel") == "noopener noreferrer nofollow"
    assert "snake_case_name stays, 2 * 3 * 4 too." in body.inner_text()
    body.locator(".copy").click()
    assert page.evaluate("navigator.clipboard.readText()").startswith("def cut(total: int")
    shoot(page, "light")
    page.click("#toggle-theme")
    shoot(page, "dark")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_the_same_text_drawn_piece_by_piece_or_at_once(page: Any) -> None:
    texts = [
        MARKDOWN,
        *XSS,
        "1. a\n\n   b\n2. c\n\ntext",
        "```\nopen",
        "- a\n- b\n\n\n- c",
        "a\n---\nb",
        "* \n*",
        "|a|\n|-|",
    ]
    same = page.evaluate(
        """async (texts) => {
            const { update } = await import("./static/markdown.js");
            return texts.map((text) => {
                const [grown, whole] = [document.createElement("div"), document.createElement("div")];
                for (let i = 0; i <= text.length; i++) update(grown, text.slice(0, i));
                update(whole, text);
                return grown.innerHTML === whole.innerHTML && (text.trim() === "" || whole.innerHTML !== "");
            });
        }""",
        texts,
    )
    assert same == [True] * len(texts)


def test_nothing_a_model_says_becomes_markup_or_script(page: Any, api: FakeApi) -> None:
    api.reply = "\n\n".join(XSS)
    api.thoughts = XSS[1]
    ask(page, XSS[1])
    body = answer(page)
    elements = set(body.locator("*").evaluate_all("nodes => nodes.map((n) => n.tagName)"))
    assert not elements & {"SCRIPT", "IMG", "IFRAME", "FORM", "STYLE", "OBJECT", "B"}
    attributes = page.locator("#messages *").evaluate_all("nodes => nodes.flatMap((n) => n.getAttributeNames())")
    assert not [name for name in attributes if name.startswith("on")]
    links = body.locator("a").evaluate_all("nodes => nodes.map((n) => n.protocol)")
    assert set(links) <= {"https:"}
    assert XSS[0] in body.inner_text()
    page.reload()
    page.locator(".message.assistant").wait_for()
    assert page.evaluate("window.pwned") is None


@pytest.mark.parametrize("text", ["*a" * 9999, "`a``" * 9999, "__a" * 9999, "[" * 30_000, ">" * 20_000, "![a](" * 9999])
def test_odd_text_does_not_freeze_the_page(page: Any, text: str) -> None:
    milliseconds = page.evaluate(
        """async (text) => {
            const { update } = await import("./static/markdown.js");
            const started = performance.now();
            update(document.createElement("div"), text);
            return performance.now() - started;
        }""",
        text,
    )
    assert milliseconds < 8000  # a catastrophic pattern would take hours


def test_thoughts_are_folded_away(page: Any, api: FakeApi) -> None:
    api.thoughts, api.reply = "First I wonder.", "Done."
    ask(page, "Think")
    assert answer(page).inner_text() == "Done."
    details = page.locator("details.thoughts")
    assert details.get_attribute("open") is None and "First I wonder." in details.text_content()


# --- what one can do ---


def test_stop_keeps_what_came_and_hangs_up(page: Any, api: FakeApi) -> None:
    api.reply, api.delay = "word " * 400, 0.02
    ask(page, "Talk")
    page.locator(".assistant .body", has_text="word word").wait_for()
    assert page.locator(".message.busy").count() == 1
    page.press("#input", "Escape")
    assert answer(page).inner_text().startswith("word word")
    assert "stopped" in page.locator(".assistant .facts").inner_text()
    page.wait_for_timeout(300)
    assert api.hung_up == 1


def test_regenerate_and_edit(page: Any, api: FakeApi) -> None:
    api.reply = "One."
    ask(page, "First")
    answer(page)
    api.reply = "Two."
    page.get_by_role("button", name="Answer again").click()
    page.locator(".assistant .body", has_text="Two.").wait_for()
    answer(page)
    assert page.locator(".message").count() == 2
    assert api.bodies[1]["messages"] == [{"role": "user", "content": "First"}]
    ask(page, "Second")
    answer(page, 1)
    assert [m["content"] for m in api.bodies[2]["messages"]] == ["First", "Two.", "Second"]
    page.locator(".message.user").first.hover()
    page.get_by_role("button", name="Edit and ask again").first.click()
    page.fill(".editor textarea", "Other")
    page.press(".editor textarea", "Enter")
    answer(page)
    assert page.locator(".message").count() == 2
    assert api.bodies[3]["messages"] == [{"role": "user", "content": "Other"}]


def test_conversations_are_kept_listed_and_deleted(page: Any, api: FakeApi) -> None:
    ask(page, "About cats")
    answer(page)
    page.keyboard.press("Alt+n")
    assert page.locator("#empty").is_visible()
    ask(page, "About dogs")
    answer(page)
    page.reload()
    titles = page.locator("#conversations .open")
    assert titles.all_inner_texts() == ["About dogs", "About cats"]
    titles.nth(1).click()
    assert page.locator(".message.user .body").inner_text() == "About cats"
    page.locator("#conversations li", has_text="About cats").hover()
    page.get_by_role("button", name="Delete About cats").click()
    assert titles.all_inner_texts() == ["About dogs"]
    page.reload()
    assert titles.all_inner_texts() == ["About dogs"]


def test_damaged_storage_does_not_break_the_page(page: Any, api: FakeApi) -> None:
    page.evaluate(
        """() => {
            localStorage.setItem("multitensor.conversation.a", "{broken");
            localStorage.setItem("multitensor.conversation.b", '{"messages": 7}');
            localStorage.setItem("multitensor.conversation.c", '{"messages": [null]}');
            localStorage.setItem("multitensor.settings", "[");
        }"""
    )
    page.reload()
    ask(page, "Still there?")
    assert answer(page).inner_text() == "Hello there."


def test_an_answer_goes_on_while_another_conversation_is_shown(page: Any, api: FakeApi) -> None:
    api.reply, api.delay = "slow " * 30, 0.02
    ask(page, "Slow one")
    page.locator(".assistant .body", has_text="slow").wait_for()
    page.click("#new")
    assert page.locator(".message").count() == 0
    page.locator("#send:visible").wait_for()
    page.locator("#conversations .open", has_text="Slow one").click()
    assert answer(page).inner_text() == api.reply.strip()


def test_one_answer_at_a_time_in_all_conversations(page: Any, api: FakeApi) -> None:
    ask(page, "Short one")
    answer(page)
    api.reply, api.delay = "slow " * 400, 0.02
    page.click("#new")
    ask(page, "Slow one")
    page.locator(".assistant .body", has_text="slow").wait_for()
    page.locator("#conversations .open", has_text="Short one").click()
    page.locator(".message.user").hover()
    page.get_by_role("button", name="Edit and ask again").click()
    assert page.locator(".editor").count() == 0 and page.locator("#stop").is_visible()
    page.locator("#conversations .open", has_text="Slow one").click()
    assert page.locator(".message.busy").count() == 1
    shoot(page, "answering")
    page.press("#input", "Escape")
    assert answer(page).inner_text().startswith("slow slow")
    page.wait_for_timeout(300)
    assert api.hung_up == 1 and len(api.bodies) == 2
    assert page.locator("#send").is_visible() and not page.locator("#stop").is_visible()


def test_an_editor_left_open_starts_no_second_answer(page: Any, api: FakeApi) -> None:
    ask(page, "First")
    answer(page)
    page.locator(".message.user").hover()
    page.get_by_role("button", name="Edit and ask again").click()
    page.locator(".editor textarea").wait_for()
    api.reply, api.delay = "slow " * 60, 0.02
    editor = page.locator(".editor textarea").element_handle()
    ask(page, "Second")
    editor.evaluate("node => node.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter'}))")
    answer(page, 1)
    assert len(api.bodies) == 2 and page.locator(".message").count() == 4


def test_a_conversation_deleted_while_it_is_answered_stays_deleted(page: Any, api: FakeApi) -> None:
    api.reply, api.delay = "slow " * 400, 0.02
    ask(page, "Slow one")
    page.locator(".assistant .body", has_text="slow").wait_for()
    page.locator("#conversations li", has_text="Slow one").hover()
    page.get_by_role("button", name="Delete Slow one").click()
    page.locator("#send:visible").wait_for()
    assert page.locator("#conversations li").count() == 0
    page.reload()
    page.locator("#dot.ready").wait_for()
    assert page.locator("#conversations li").count() == 0


def test_numbers_between_the_steps_are_sent(page: Any, api: FakeApi) -> None:
    page.click("#toggle-settings")
    given = {"temperature": 0.72, "top_p": 0.955, "min_p": 0.015, "repetition_penalty": 1.13}
    for name, value in given.items():
        page.fill(f"#s-{name}", str(value))
    page.fill("#s-top_k", "1.5")  # tokens are counted
    invalid = page.locator("#settings [aria-invalid=true]").evaluate_all("nodes => nodes.map((node) => node.id)")
    assert invalid == ["s-top_k"]
    shoot(page, "numbers")
    page.keyboard.press("Escape")
    ask(page, "Hi")
    answer(page)
    assert {name: api.bodies[0].get(name) for name in given} == given and "top_k" not in api.bodies[0]


def test_settings_are_sent_and_kept(page: Any, api: FakeApi) -> None:
    page.click("#toggle-settings")
    page.fill("#system", "Be brief.")
    for name, value in (("temperature", "0.7"), ("top_p", "0.9"), ("top_k", "40"), ("min_p", "0.05"), ("seed", "7")):
        page.fill(f"#s-{name}", value)
    page.fill("#s-max_completion_tokens", "99")
    page.fill("#s-repetition_penalty", "-3")  # out of range: not sent
    page.fill("#s-stop", "END")
    shoot(page, "settings")
    page.keyboard.press("Escape")
    assert page.locator("#settings").is_hidden()
    ask(page, "Hi")
    answer(page)
    body = api.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    sent = {name: body.get(name) for name in ("temperature", "top_p", "top_k", "min_p", "seed", "stop")}
    assert sent == {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "seed": 7, "stop": "END"}
    assert body["max_completion_tokens"] == 99 and "repetition_penalty" not in body
    page.reload()
    assert page.input_value("#s-temperature") == "0.7" and page.input_value("#system") == "Be brief."


def test_a_server_with_keys_asks_for_one(page: Any, api: FakeApi) -> None:
    api.key = "mt-secret"
    page.reload()
    page.locator("#notice", has_text="API key").wait_for()
    page.locator("#settings").wait_for()
    page.fill("#api-key", "mt-secret")
    page.press("#api-key", "Tab")
    page.locator("#dot.ready").wait_for()
    page.keyboard.press("Escape")
    ask(page, "Hi")
    assert answer(page).inner_text() == "Hello there."
    kept = page.evaluate("[Object.values(localStorage).join(), Object.values(sessionStorage).join()]")
    assert "mt-secret" not in kept[0] and "mt-secret" in kept[1], "only for this tab unless told otherwise"


def test_errors_are_shown_and_one_can_try_again(page: Any, api: FakeApi) -> None:
    api.error = (400, "the prompt has 9000 tokens, the context only 8192")
    ask(page, "Long")
    page.locator(".foot .error", has_text="the context only 8192").wait_for()
    api.error = None
    api.break_after = 2
    page.get_by_role("button", name="Answer again").click()
    page.locator(".foot .error", has_text="before the answer was complete").wait_for()
    assert page.locator(".assistant .body").inner_text() == "Hello"
    api.break_after = None
    page.get_by_role("button", name="Answer again").click()
    page.locator(".assistant .body", has_text="Hello there.").wait_for()


# --- the panel, the keyboard, the phone ---


def test_the_panel_shows_the_split(page: Any) -> None:
    panel = page.locator("#panel")
    page.locator(".device").nth(2).wait_for()
    text = panel.inner_text()
    for part in ("cuda:0", "RTX 3090", "50%", "20%", "tokens a second", "70%", "18,432 of 65,536", "311 W"):
        assert part in text
    page.locator(".row", has_text="In reductions").first.wait_for()
    widths = (
        page.locator("#split > section").first.locator(".bar span").evaluate_all("n => n.map((s) => s.offsetWidth)")
    )
    assert widths[0] > widths[1] > widths[2] > 0
    page.click("#toggle-panel")
    assert panel.is_hidden()
    page.reload()
    assert panel.is_hidden()
    page.click("#toggle-panel")
    assert panel.is_visible()


def test_by_keyboard_alone(page: Any, api: FakeApi) -> None:
    page.keyboard.type("Line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    answer(page)
    assert api.bodies[0]["messages"][0]["content"] == "Line\ntwo"
    page.keyboard.press("ArrowUp")
    page.locator(".editor textarea").wait_for()
    page.keyboard.press("Escape")
    page.locator("#toggle-theme").focus()
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "input" and page.input_value("#input") == ""
    names = page.locator("button:visible, input:visible, textarea:visible").evaluate_all(
        "n => n.map((e) => e.ariaLabel || e.innerText.trim() || e.labels?.[0]?.innerText || '')"
    )
    assert all(names), "every control has a name"


def test_on_a_phone(browser: Any, api: FakeApi, server: tuple[FakeApi, str]) -> None:
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True, device_scale_factor=2
    )
    page = context.new_page()
    page.set_default_timeout(TIMEOUT)
    page.goto(server[1])
    api.reply = MARKDOWN + "\n```\n" + "wide " * 60 + "\n```\n" + "x" * 300
    page.fill("#input", "How is a matrix cut?")
    page.tap("#send")
    answer(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("document.querySelector('#messages').scrollWidth") <= 390
    box = page.locator("#composer").bounding_box()
    assert box["y"] + box["height"] <= 845
    shoot(page, "phone")
    assert page.locator("#panel").is_hidden() and page.locator("#sidebar").is_hidden()
    page.tap("#toggle-panel")
    page.locator(".device").nth(2).wait_for()
    shoot(page, "phone-panel")
    page.touchscreen.tap(10, 400)
    assert page.locator("#panel").is_hidden()
    page.tap("#open-sidebar")
    assert page.locator("#conversations").get_by_text("How is a matrix cut?").is_visible()
    shoot(page, "phone-sidebar")
    context.close()


def test_settings_json_round_trip_is_plain(page: Any, api: FakeApi) -> None:
    """What is kept is readable JSON that an export could use."""
    ask(page, "Keep me")
    answer(page)
    name, text = page.evaluate("Object.entries(localStorage).find(([name]) => name.includes('conversation'))")
    kept = json.loads(text)
    assert name == f"multitensor.conversation.{kept['id']}"
    assert [m["role"] for m in kept["messages"]] == ["user", "assistant"]
