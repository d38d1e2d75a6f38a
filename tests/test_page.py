"""The chat page in a real browser, against a scripted server (page_server.py), and against serve.py itself.

Needs playwright and a Chromium: the one that CHROMIUM names, or `chromium` on the path (Debian: apt install chromium).
"""

import base64
import hashlib
import html.parser
import io
import json
import math
import os
import re
import secrets
import shutil
import time

import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from page_server import FIELDS, PAGE, Answer, PageServer
from serving import Server

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium: install Debian's, or name one with CHROMIUM")

PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
BASE = {"model": "brisk-1b", "stream": True, "stream_options": {"include_usage": True}}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


# ---------------------------------------------------------------- the browser, a server and the page


@pytest.fixture(scope="module")
def browser():
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def server():
    with PageServer() as server:
        yield server


class Watch:
    """What no page may do: log an error (but those that a test expects), fail in a script, or ask another server."""

    def __init__(self, origin):
        self.origin, self.expected, self.wrong = origin, (), []

    def page(self, page):
        page.on("console", lambda message: self.console(message.type, message.text))
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("request", lambda request: self.request(request.url))
        page.set_default_timeout(10000)
        return page

    def console(self, kind, text):
        if kind in ("error", "warning") and not any(part in text for part in self.expected):
            self.wrong.append(text)

    def request(self, url):
        if not url.startswith((self.origin, "data:", "blob:" + self.origin)):
            self.wrong.append(f"a request to {url}")


@pytest.fixture
def watch(server):
    watch = Watch(server.url)
    yield watch
    assert not watch.wrong


@pytest.fixture
def context(browser):
    context = browser.new_context()
    yield context
    context.close()


@pytest.fixture
def page(context, server, watch):
    page = watch.page(context.new_page())
    open_page(page, server)
    return page


def open_page(page, server):
    page.goto(server.url)
    expect(page.locator("#model option")).to_have_count(len(server.models))


def send(page, text):
    page.fill("#draft", text)
    page.press("#draft", "Enter")


def ask(page, server, question, *pieces, **options):
    """Sends a question and waits for the whole answer."""
    server.script(Answer(pieces, **options))
    send(page, question)
    finished(page)


def finished(page):
    expect(page.locator("#send")).to_be_visible()


def answers(page):
    return page.locator(".answer .body")


def facts(page):
    return page.locator(".facts").last


def reload(page):
    page.reload()
    expect(page.locator("#model option")).not_to_have_count(0)


# ---------------------------------------------------------------- a conversation


def test_an_answer_is_shown_while_it_comes(page, server):
    answer = Answer(["The first ", "half", " and the rest"], usage=(812, 790, 230), hold_after=2)
    server.script(answer)
    send(page, "Question?")
    expect(page.locator(".question .text")).to_have_text("Question?")
    expect(answers(page)).to_have_text("The first half")
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "true")
    assert page.input_value("#draft") == ""
    answer.release.set()
    expect(answers(page)).to_have_text("The first half and the rest")
    finished(page)
    expect(facts(page)).to_have_text(
        re.compile(r"^[\d.]+ tokens/s · \d+\.\d\d s to the first token · prompt 812 \(790 cached\), answer 230$")
    )
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
    assert server.completions == [BASE | {"messages": [user("Question?")]}]


def test_each_turn_sends_the_whole_conversation(page, server):
    ask(page, server, "one", "1")
    ask(page, server, "two\nlines", "2")
    ask(page, server, "three", "3")
    messages = [user("one"), assistant("1"), user("two\nlines"), assistant("2"), user("three")]
    assert [body["messages"] for body in server.completions] == [messages[:1], messages[:3], messages]


@pytest.mark.parametrize("by", ["button", "key"])
def test_stopping_ends_the_request_and_keeps_what_came(page, server, by):
    server.script(Answer(["Only ", "this", " not this"], hold_after=2))
    send(page, "Question?")
    expect(answers(page)).to_have_text("Only this")
    if by == "button":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    finished(page)
    expect(answers(page)).to_have_text("Only this")
    expect(facts(page)).to_contain_text("stopped")
    wait_for(lambda: server.disconnects == 1)
    ask(page, server, "Next?", "ok")
    assert server.completions[-1]["messages"] == [user("Question?"), assistant("Only this"), user("Next?")]


def wait_for(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_regenerating_replaces_an_answer_and_can_be_undone(page, server):
    ask(page, server, "one", "first")
    ask(page, server, "two", "second")
    server.script(Answer("another"))
    page.locator(".answer").first.hover()
    page.locator(".answer >> nth=0 >> text=Regenerate").click()
    expect(answers(page)).to_have_text(["another"])
    assert server.completions[-1]["messages"] == [user("one")]
    page.click("#toast >> text=Undo")
    expect(answers(page)).to_have_text(["first", "second"])
    reload(page)
    expect(answers(page)).to_have_text(["first", "second"])


def test_regenerating_while_an_answer_comes_replaces_that_one(page, server):
    server.script(Answer(["slow", "er"], hold_after=1), Answer("quick"))
    send(page, "one")
    expect(answers(page)).to_have_text("slow")
    page.click("text=Regenerate")
    expect(answers(page)).to_have_text(["quick"])
    finished(page)
    wait_for(lambda: server.disconnects == 1)
    reload(page)
    expect(answers(page)).to_have_text(["quick"])


def test_any_question_can_be_edited_and_is_asked_again_from_there(page, server):
    ask(page, server, "one", "first")
    ask(page, server, "two", "second")
    page.locator(".question").first.hover()
    page.locator(".question >> nth=0 >> text=Edit").click()
    expect(page.locator("#edit")).to_have_value("one")
    page.press("#edit", "Escape")
    expect(page.locator(".question .text")).to_have_text(["one", "two"])
    page.locator(".question >> nth=0 >> text=Edit").click()
    page.fill("#edit", "uno")
    server.script(Answer("primo"))
    page.press("#edit", "Enter")
    expect(answers(page)).to_have_text(["primo"])
    expect(page.locator(".question .text")).to_have_text(["uno"])
    assert server.completions[-1]["messages"] == [user("uno")]


def test_a_reload_keeps_the_conversation_and_the_draft(page, server):
    ask(page, server, "Question?", "Some **answer**")
    page.fill("#draft", "not sent yet\n")
    before = page.locator("#messages").inner_html()
    reload(page)
    assert page.locator("#messages").inner_html() == before
    expect(page.locator("#draft")).to_have_value("not sent yet\n")
    expect(page.locator("#chats a")).to_have_text(["Question?"])


def test_a_reload_keeps_what_came_of_an_answer(page, server):
    server.script(Answer(["part one", " part two", " never"], hold_after=2))
    send(page, "Question?")
    expect(answers(page)).to_have_text("part one part two")
    reload(page)
    expect(answers(page)).to_have_text("part one part two")
    expect(facts(page)).to_contain_text("unfinished")
    finished(page)
    wait_for(lambda: server.disconnects == 1)


def test_reasoning_is_open_while_it_comes_and_is_not_sent_back(page, server):
    answer = Answer([{"reasoning_content": "Let me *think*"}, "42"], hold_after=1)
    server.script(answer)
    send(page, "Question?")
    expect(page.locator(".reasoning")).to_have_attribute("open", "")
    expect(page.locator(".reasoning .markdown")).to_have_text("Let me think")
    expect(page.locator(".reasoning summary")).to_have_text("Thinking…")
    answer.release.set()
    finished(page)
    expect(page.locator(".reasoning")).not_to_have_attribute("open", "")
    expect(page.locator(".reasoning summary")).to_have_text(re.compile(r"Thought for \d+\.\d s"))
    ask(page, server, "Next?", "ok")
    assert server.completions[-1]["messages"] == [user("Question?"), assistant("42"), user("Next?")]


def test_tool_calls_are_shown(page, server):
    deltas = [
        [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}],
        [{"index": 0, "function": {"arguments": '{"city":'}}],
        [{"index": 0, "function": {"arguments": ' "Ulm"}'}}],
        [{"index": 1, "id": "call_2", "type": "function", "function": {"name": "clock", "arguments": "{}"}}],
    ]
    ask(page, server, "Question?", *({"tool_calls": delta} for delta in deltas), finish="tool_calls")
    expect(page.locator(".answer pre")).to_have_text(['weather({"city": "Ulm"})', "clock({})"])


def test_events_may_be_cut_anywhere(page, server):
    ask(page, server, "Question?", "naïve 日本語 🙂", " end", bytes_at_a_time=3)
    expect(answers(page)).to_have_text("naïve 日本語 🙂 end")


def test_the_draft_is_counted_in_tokens(page):
    page.fill("#draft", "three small words")
    expect(page.locator("#draft-tokens")).to_have_text("3 tokens")
    page.fill("#draft", "")
    expect(page.locator("#draft-tokens")).to_have_text("")


# ---------------------------------------------------------------- what is sent


def open_settings(page):
    page.click("#open-settings")
    expect(page.locator("#settings-panel")).to_be_visible()


def test_settings_are_sent_only_when_they_are_set(page, server):
    open_settings(page)
    values = {
        "temperature": ("0.7", 0.7),
        "top_p": (".9", 0.9),
        "top_k": ("40", 40),
        "min_p": ("0", 0),
        "repetition_penalty": ("1.1", 1.1),
        "presence_penalty": ("-0.5", -0.5),
        "frequency_penalty": ("2", 2),
        "max_tokens": ("100", 100),
        "min_tokens": ("3", 3),
        "seed": ("7", 7),
        "stop": ("User:\n\\n\\n", ["User:", "\n\n"]),
    }
    for name, (text, value) in values.items():
        page.fill("#setting-" + name, text)
        ask(page, server, "Question?", "ok")
        sent = server.completions[-1]
        del sent["messages"]
        assert sent == BASE | {name: value}
        page.fill("#setting-" + name, "")
    for name, (text, _) in values.items():
        page.fill("#setting-" + name, text)
    reload(page)
    ask(page, server, "Question?", "ok")
    assert server.completions[-1].items() >= {name: value for name, (_, value) in values.items()}.items()
    expect(page.locator("#in-force")).to_contain_text("temperature 0.7 · top-p .9")
    open_settings(page)
    page.click("#reset")
    ask(page, server, "Question?", "ok")
    assert server.completions[-1].keys() == BASE.keys() | {"messages"}
    assert set(values) <= FIELDS.keys() and not server.refused
    for name in values:  # each says what it does
        assert len(page.locator(f"#setting-{name}-hint").inner_text()) > 20
        expect(page.locator(f"#setting-{name}")).to_have_attribute("aria-describedby", f"setting-{name}-hint")


def test_a_setting_that_is_out_of_range_is_not_sent(page, server):
    open_settings(page)
    page.fill("#setting-top_p", "1.5")
    page.click("#close-settings")
    send(page, "Question?")
    expect(page.locator("#setting-top_p")).to_be_focused()
    assert page.input_value("#draft") == "Question?" and not server.completions


def test_a_json_schema_is_sent_as_it_was_given(page, server):
    schema = {"type": "object", "properties": {"größe": {"type": "number", "minimum": 1e-3}}, "required": ["größe"]}
    open_settings(page)
    page.fill("#schema", json.dumps(schema, indent=2))
    ask(page, server, "Question?", '{"größe": 1}')
    json_schema = {"name": "answer", "schema": schema, "strict": True}
    assert server.completions[0]["response_format"] == {"type": "json_schema", "json_schema": json_schema}
    page.click(".new-chat >> visible=true")  # the schema belongs to its conversation
    ask(page, server, "Question?", "ok")
    assert "response_format" not in server.completions[1]


@pytest.mark.parametrize("text", ["{", "[1]", "null", "12", "{'a': 1}"])
def test_what_is_no_json_schema_is_not_sent(page, server, text):
    open_settings(page)
    page.fill("#schema", text)
    expect(page.locator("#schema-wrong")).to_have_text(re.compile("JSON"))
    send(page, "Question?")
    expect(page.locator("#schema")).to_be_focused()
    assert page.input_value("#draft") == "Question?" and not server.completions
    page.fill("#schema", "{}")
    ask(page, server, "Question?", "ok")
    assert server.completions[0]["response_format"]["json_schema"]["schema"] == {}


def test_each_conversation_has_its_system_message(page, server):
    open_settings(page)
    page.fill("#system", "Be brief.")
    ask(page, server, "one", "1")
    page.keyboard.press("Control+k")
    expect(page.locator("#system")).to_have_value("")
    ask(page, server, "two", "2")
    page.click("#chats >> text=one")
    expect(page.locator("#system")).to_have_value("Be brief.")
    ask(page, server, "three", "3")
    system = {"role": "system", "content": "Be brief."}
    assert server.completions[0]["messages"] == [system, user("one")]
    assert server.completions[1]["messages"] == [user("two")]
    assert server.completions[2]["messages"] == [system, user("one"), assistant("1"), user("three")]


def test_the_model_can_be_chosen(context, server, watch):
    server.models = ["small", "large"]
    page = watch.page(context.new_page())
    open_page(page, server)
    ask(page, server, "one", "1")
    page.select_option("#model", "large")
    reload(page)
    ask(page, server, "two", "2")
    assert [body["model"] for body in server.completions] == ["small", "large"]


def test_an_api_key_is_asked_for_and_kept(context, server, watch):
    server.api_key = "secret"
    watch.expected = ["401"]
    page = watch.page(context.new_page())
    page.goto(server.url)
    expect(page.locator("#banner")).to_contain_text("asks for an API key")
    page.click("text=Enter it")
    page.fill("#api-key", "secret")
    page.press("#api-key", "Tab")
    expect(page.locator("#banner")).to_be_hidden()
    watch.expected = []
    ask(page, server, "Question?", "ok")
    reload(page)
    ask(page, server, "Question?", "ok")
    keys = [headers.get("Authorization") for _, path, headers in server.requests if path == "/v1/chat/completions"]
    assert keys == ["Bearer secret"] * 2


# ---------------------------------------------------------------- what goes wrong


def test_the_connection_is_lost_in_the_middle(page, server, watch):
    watch.expected = ["ERR_CONNECTION_RESET"]
    server.script(Answer(["What ", "came", " not this"], drop_after=2))
    send(page, "Question?")
    expect(page.locator(".failure")).to_contain_text("The connection to the server was lost.")
    expect(answers(page)).to_have_text("What came")
    reload(page)
    expect(answers(page)).to_have_text("What came")
    server.script(Answer("Everything"))
    page.click("text=Try again")
    expect(answers(page)).to_have_text(["Everything"])
    expect(page.locator(".failure")).to_be_hidden()


def test_a_stream_without_its_end_is_no_whole_answer(page, server):
    ask(page, server, "Question?", "cut", truncated=True)
    expect(page.locator(".failure")).to_contain_text("The connection ended before the answer did.")
    expect(answers(page)).to_have_text("cut")


def test_a_server_that_is_away_is_said_and_noticed_when_it_is_back(watch, context):
    watch.expected = ["ERR_CONNECTION"]
    with PageServer() as server:
        port = server.server_address[1]
        watch.origin = server.url
        page = watch.page(context.new_page())
        open_page(page, server)
    send(page, "Question?")
    expect(page.locator("#banner")).to_contain_text(f"The server at 127.0.0.1:{port} does not answer")
    expect(page.locator(".failure")).to_contain_text("The server does not answer.")
    send(page, "Another?")
    expect(page.locator(".failure")).to_have_count(2)
    with PageServer(port) as server:
        expect(page.locator("#banner")).to_be_hidden()
        server.script(Answer("Here I am"))
        page.locator("text=Try again").last.click()
        expect(answers(page).last).to_have_text("Here I am")
        # A question that got no answer and the next one are one: templates want the roles to alternate.
        assert server.completions[0]["messages"] == [user("Question?\n\nAnother?")]


def test_a_server_that_goes_away_in_the_middle_is_said(watch, context):
    watch.expected = ["ERR_"]
    with PageServer() as server:
        watch.origin = server.url
        page = watch.page(context.new_page())
        open_page(page, server)
        server.script(Answer(["What ", "came", " not this"], hold_after=2))
        send(page, "Question?")
        expect(answers(page)).to_have_text("What came")
    expect(page.locator(".failure")).to_contain_text("The connection to the server was lost.")
    expect(page.locator("#banner")).to_contain_text("does not answer")
    expect(answers(page)).to_have_text("What came")


def test_an_error_of_the_server_is_shown_in_its_words(page, server, watch):
    watch.expected = ["400", "500"]
    message = "This model's context is 2048 tokens, but the prompt has 3000."
    server.script(
        Answer("", refusal=(400, {"error": {"message": message, "type": "invalid_request_error", "code": None}}))
    )
    send(page, "Question?")
    expect(page.locator(".failure")).to_contain_text(message)
    finished(page)
    server.script(Answer("", refusal=(500, {"detail": "not in OpenAI's form"})))
    send(page, "Question?")
    expect(page.locator(".failure").last).to_contain_text("not in OpenAI's form")


def test_an_error_in_the_middle_is_shown_below_what_came(page, server):
    ask(page, server, "Question?", "What came", " not this", error_after=1)
    expect(answers(page)).to_have_text("What came")
    expect(page.locator(".failure")).to_contain_text("The cache is full")


def test_a_full_storage_is_said_and_the_conversation_goes_on(context, server, watch):
    page = watch.page(context.new_page())
    page.add_init_script("Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') }")
    open_page(page, server)
    ask(page, server, "one", "1")
    expect(page.locator("#banner")).to_contain_text("storage is full")
    ask(page, server, "two", "2")
    expect(answers(page)).to_have_text(["1", "2"])
    assert server.completions[1]["messages"] == [user("one"), assistant("1"), user("two")]


def test_without_any_storage_the_page_works(context, server, watch):
    page = watch.page(context.new_page())
    page.add_init_script(
        "for (const name of ['localStorage', 'sessionStorage'])"
        " Object.defineProperty(window, name, { get() { throw new DOMException('off', 'SecurityError') } })"
    )
    open_page(page, server)
    ask(page, server, "one", "1")
    ask(page, server, "two", "2")
    expect(answers(page)).to_have_text(["1", "2"])


# ---------------------------------------------------------------- what a model may write

HOSTILE = [
    "<script>window.ran = 1</script>",
    "<img src=x onerror='window.ran = 1'>",
    "<svg onload='window.ran = 1'><iframe srcdoc='<script>parent.ran = 1</script>'></iframe>",
    "[click](javascript:window.ran=1) [b](JaVaScRiPt:window.ran=1) [c](data:text/html,<script>window.ran=1</script>)",
    "<javascript:window.ran=1> [d](\tjavascript:window.ran=1) [e](vbscript:x) [f](//evil.example) [g](/v1/models)",
    "![image](http://evil.example/a.png) ![](javascript:window.ran=1)",
    "| <b onclick='window.ran=1'>x</b> |\n|---|\n| <img src=x onerror=window.ran=1> |",
    "```<script>window.ran=1</script>\n</code></pre><script>window.ran=1</script>\n```",
    "`<img src=x onerror=window.ran=1>` **<img src=x onerror=window.ran=1>**\n# <style>*{display:none}</style>",
    "<a href='javascript:window.ran=1'>x</a><form action='http://evil.example'><input name=a></form>",
]


def test_markup_in_an_answer_stays_text_and_nothing_runs(page, server):
    made = "script,img,iframe,svg,style,form,input,object,embed,link,base,b"
    for text in HOSTILE:
        ask(page, server, text, {"reasoning_content": text}, text)
    assert page.locator(f"#messages :is({made})").count() == 0
    links = page.locator("#messages a").evaluate_all("all => all.map(a => [a.protocol, a.rel, a.target])")
    assert links and all(link == ["http:", "noopener noreferrer", "_blank"] for link in links)
    page.locator("#messages").evaluate(
        "node => node.querySelectorAll('a').forEach(a => a.href.startsWith('http') || a.click())"
    )
    assert page.locator(".question .text").all_text_contents() == HOSTILE
    shown = page.locator(".answer .body").all_text_contents()
    assert all("window.ran" in text or "evil.example" in text for text in shown)
    assert page.evaluate("window.ran") is None
    reload(page)
    assert page.evaluate("window.ran") is None
    assert page.locator(f"#messages :is({made})").count() == 0


def test_the_policy_allows_this_script_alone(page, watch):
    watch.expected = ["TrustedHTML"]
    text = PAGE.read_text(encoding="utf-8")
    [script] = re.findall(r'<script type="module">(.*?)</script>', text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in text, f"the script has changed: its hash is sha256-{digest}"
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "DOMParser"):
        assert word not in script
    assert not re.findall(r"(?:src|href)=[\"']?https?:", text)
    assert page.evaluate("try { document.body.innerHTML = '<p>'; 'set' } catch (error) { error.name }") == "TypeError"


class Tree(html.parser.HTMLParser):
    """HTML -> nested lists: ["p", {}, "text", ["em", {}, "more"]]; void elements have no children."""

    def __init__(self, text):
        super().__init__()
        self.open = [["root", {}]]
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        kept = {name: value for name, value in attributes if name in ("href", "start")}
        if "text-align" in dict(attributes).get("style", ""):
            kept["align"] = re.search(r"text-align: ?(\w+)", dict(attributes)["style"])[1]
        node = [tag, kept]
        self.open[-1].append(node)
        if tag not in ("br", "hr"):
            self.open.append(node)

    def handle_endtag(self, tag):
        if tag not in ("br", "hr"):
            self.open.pop()

    def handle_data(self, data):
        self.open[-1].append(data)


def normal(node):
    """A tree in the form that does not tell apart what looks the same: a list's paragraphs, our code block's frame."""
    if isinstance(node, str):
        return node
    tag, attributes, *children = node
    if tag == "figure":
        return normal(["pre", {}, *children[1][2:]])
    if tag == "div" and len(children) == 1:  # around a table
        return normal(children[0])
    if tag == "s":
        tag = "del"
    if tag == "ol" and attributes.get("start") == "1":
        attributes = {}
    result = []
    for child in map(normal, children):
        is_first = not any(part.strip() if isinstance(part, str) else part for part in result)
        parts = child[2:] if tag == "li" and child[0] == "p" and is_first else [child]
        for part in parts:
            if isinstance(part, str) and result and isinstance(result[-1], str):
                result[-1] += part
            else:
                result.append(part)
    if tag in ("root", "ul", "ol", "li", "blockquote", "table", "thead", "tbody", "tr"):
        result = [part for part in result if not isinstance(part, str) or part.strip()]
        result = [part.strip() if isinstance(part, str) else part for part in result]
    if tag == "code" and result:
        result[-1] = result[-1].rstrip("\n")
    if tag == "br":
        return ["br", {}]
    for i, part in enumerate(result):  # a line break's own newline
        if i and isinstance(part, str) and result[i - 1] == ["br", {}]:
            result[i] = part.removeprefix("\n")
    return [tag, attributes, *(part for part in result if part)]


@pytest.fixture(scope="module")
def reference():
    """Text -> tree, by markdown-it: CommonMark with GitHub's tables; line breaks in a paragraph are kept."""
    markdown_it = pytest.importorskip("markdown_it", reason="markdown-it-py is not installed")
    parser = markdown_it.MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    return lambda text: normal(Tree(parser.render(text)).open[0])


def rendered(page, texts):
    """The trees of texts as answers, all shown at once."""
    store(page, [message for text in texts for message in ({"role": "user", "content": "?"}, assistant(text))])
    return [normal(Tree(body).open[0]) for body in answers(page).evaluate_all("all => all.map(node => node.innerHTML)")]


def store(page, messages):
    """Puts a conversation of these messages into the page, as a file would."""
    chat = {"id": secrets.token_hex(8), "name": "x", "messages": messages}
    data = json.dumps({"conversations": [chat]}).encode()
    page.evaluate("localStorage.clear()")
    page.set_input_files("#import-file", {"name": "a.json", "mimeType": "application/json", "buffer": data})
    page.click(f"#chats a[href='#{chat['id']}']")
    expect(page.locator(f"#chats a[href='#{chat['id']}'][aria-current=page]")).to_be_visible()


CASES = [
    "# One\n## Two ##\n###### Six\n####### seven\n#none",
    "plain *em* _em_ **strong** __strong__ ***both*** ~~gone~~ `code`",
    "**bold *and em* more** and *em **and bold** more*",
    "snake_case_name and 2 * 3 * 4, ** not bold ** and * not em*",
    "`` a ` b `` and ` `` ` and `unclosed",
    "\\*not em\\* and \\`not code\\` and \\\\ and \\a",
    'a [link](https://example.org/a_(b)?c=d#e) and [**bold**](http://example.org/ "title") and <https://example.org/x>',
    "one\ntwo  \nthree\\\nfour\n\nfive",
    "```python\ndef f():\n\treturn '*'\n\n# no heading\n```\nafter",
    "~~~\na\n```\nb\n~~~",
    "````\n```\ninner\n```\n````",
    "```\nnever closed\n  *x*",
    "- a\n- b\n  - c\n    - d\n- e",
    "- a\n\t- b\n\t\t- c\n- d\n\n\tmore\n\n\t```\n\t\tcode\n\t```",
    "1. a\n2. b\n   - c\n   - d\n3. e\n",
    "7. seven\n8. eight",
    "- a\n\n  second paragraph\n\n  ```\n  code\n  ```\n- b",
    "- a\n- b\n\n* other\n* list",
    "1) a\n2) b",
    "born in\n1986. A good year",
    "text\n- list\n- at once\n\ntext",
    "- a\ngoes on\n- b",
    "> quote\n> *more*\n>\n> - list\n>   - deeper\n\nafter",
    "> lazy\nstill\n\n> > two\n> one?",
    "> ended\n>\nafter\n\n> - item\nstill the item\n# head",
    "***\n---\n_ _ _\n* * *",
    "| a | b |\n|---|:-:|\n| 1 | `x` |\n| 2 | **y** | extra |\n| 3 |\n\nafter",
    "a | b\n--|--:\n1 | x \\| y",
    "| not | a table |\n| no rule |",
    "- [link](https://example.org/)\n- `code`\n\n1. > quote in list\n2. # heading in list",
    "a  b\tc & < > \" ' &amp; &lt;",
]


def test_markdown_means_what_the_specification_says(page, reference):
    texts = [text for text in CASES if "&amp;" not in text]
    for text, tree in zip(texts, rendered(page, texts), strict=True):
        assert tree == reference(text), text


def test_markdown_that_models_write_though_no_specification_has_it(page):
    texts = {
        "1. a\n  - two spaces nest": ["ol", {}, ["li", {}, "a", ["ul", {}, ["li", {}, "two spaces nest"]]]],
        "see https://example.org/a_(b), or (https://example.org/c).": [
            "p", {}, "see ", ["a", {"href": "https://example.org/a_(b)"}, "https://example.org/a_(b)"], ", or (",
            ["a", {"href": "https://example.org/c"}, "https://example.org/c"], ").",
        ],
        "a<br>b": ["p", {}, "a", ["br", {}], "b"],
        "&amp; stays": ["p", {}, "&amp; stays"],
        "**「太字」**です": ["p", {}, ["strong", {}, "「太字」"], "です"],
    }  # fmt: skip
    assert rendered(page, texts) == [["root", {}, tree] for tree in texts.values()]


WORDS = st.lists(st.sampled_from(["a", "be", "sea", "d_e", "é", "日本", "7", "x.", "y,"]), min_size=1, max_size=4).map(
    " ".join
)
INLINE = st.recursive(
    WORDS,
    lambda inner: st.one_of(
        inner.map(lambda text: f"x *{text}* y"),
        inner.map(lambda text: f"x **{text}** y"),
        WORDS.map(lambda text: f"`{text}`"),
        inner.map(lambda text: f"[{text}](https://example.org/)"),
    ),
    max_leaves=4,
).filter(lambda text: text.count("](") < 2)  # a link in a link is none


def indented(text, by):
    return "\n".join(" " * by + line if line else line for line in text.split("\n"))


def listed(items):
    return st.sampled_from(["- ", "* ", "1. "]).map(
        lambda marker: "\n".join(marker + indented(item, len(marker))[len(marker) :] for item in items)
    )


BLOCKS = st.recursive(
    st.one_of(
        INLINE,
        st.tuples(st.integers(1, 6), INLINE).map(lambda pair: "#" * pair[0] + " " + pair[1]),
        st.lists(st.one_of(WORDS, st.just(""), st.just("  *x*")), max_size=4).map(
            lambda lines: "\n".join(["```py", *lines, "```"])
        ),
        st.tuples(INLINE, INLINE).map(lambda pair: f"| {pair[0]} | b |\n|:--|---|\n| c | {pair[1]} |"),
        st.just("---"),
    ),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).flatmap(listed),
        inner.map(lambda text: "\n".join("> " + line for line in text.split("\n"))),
        st.tuples(INLINE, inner).map("\n\n".join),
    ),
    max_leaves=6,
)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.lists(st.lists(BLOCKS, min_size=1, max_size=3).map("\n\n".join), min_size=1, max_size=25))
def test_markdown_like_the_reference(page, reference, texts):
    for text, tree in zip(texts, rendered(page, texts), strict=True):
        assert tree == reference(text), text


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(
    st.lists(
        st.text(st.one_of(st.sampled_from("*_`~[]()<>!#-+1.|:\\ \n\t"), st.characters(codec="utf-8"))),
        min_size=1,
        max_size=30,
    )
)
def test_any_text_is_shown_whole(page, texts):
    """Nothing is thrown, and letters and digits come out as they went in, in their order."""
    texts = [text.replace("\0", "") for text in texts]
    trees = rendered(page, texts)

    def words(node):
        return node if isinstance(node, str) else "".join(words(child) for child in node[2:])

    for text, tree in zip(texts, trees, strict=True):
        if not re.search(
            r"^ *(`{3}|~{3}|\d+[.)]|.*\|)|\]\(", text, re.MULTILINE
        ):  # an info string and numbers are not text
            assert re.findall(r"[a-zA-Z0-9]", words(tree)) == re.findall(r"[a-zA-Z0-9]", text)


ENDLESS = [
    *("*a " * 20000, "**a*_b_" * 5000, "~~a" * 10000, "_a_b" * 10000),
    *("`a`` " * 10000, "`" * 40000, "".join("`" * n + "a" for n in range(250))),
    *("[" * 40000, "![" * 20000, ("[" * 700 + "x" + "](http://a.b)" * 150) * 14, "[a](b" * 8000),
    *("<" * 40000, "https://" * 5000, "http://a.b" + ")" * 40000),
    *("> " * 5000 + "x", ">" * 40000, "- " * 5000 + "x", "- a\n" * 5000, "1. a\n\n" * 5000, "- a\n" + "\n" * 40000),
    *("|" * 20000 + "\n" + "|-" * 10000, "| a " * 300 + ("\n" + "|-" * 300) * 40, "a\n" * 20000),
    *("# " + " " * 40000 + "x", "#" * 40000, "# " + " #" * 20000 + "x", "~" * 40000 + "`", "~~~" + " " * 40000 + "`"),
    *("a |\n" + " " * 40000 + "x", "- " * 20000 + "-x", "\\" * 40001, "\t" * 40000 + "x"),
]


def test_no_text_stops_the_page(page):
    for text in ENDLESS:
        start = time.monotonic()
        store(page, [user("?"), assistant(text)])
        assert time.monotonic() - start < 5, text[:20]


def test_a_growing_answer_keeps_the_nodes_of_its_blocks(page, server):
    answer = Answer(["First *block*\n\nSec", "ond\n\n- th", "ird"], hold_after=2)
    server.script(answer)
    send(page, "Question?")
    expect(page.locator(".answer li")).to_have_text("th")
    page.evaluate("for (const node of document.querySelectorAll('.answer .body > *')) node.marked = true")
    answer.release.set()
    expect(page.locator(".answer li")).to_have_text("third")
    assert answers(page).evaluate("node => [...node.children].map(child => Boolean(child.marked))") == [
        True,
        True,
        False,
    ]


def test_code_and_answers_can_be_copied(page, context, server):
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    text = "Do:\n\n```sh\n  echo '<b>'\n```"
    ask(page, server, "Question?", text)
    page.click("figcaption >> text=Copy")
    expect(page.locator("figcaption button")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "  echo '<b>'"
    page.click(".answer .under >> text=Copy")
    expect(page.locator(".answer .under >> text=Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == text


# ---------------------------------------------------------------- tokens and probabilities


def token(text, probability, *others):
    def entry(text, probability):
        data = text if isinstance(text, bytes) else text.encode()
        return {"token": data.decode(errors="replace"), "bytes": list(data), "logprob": math.log(probability)}

    tops = [entry(text, probability), *(entry(*other) for other in others)]
    return entry(text, probability) | {"top_logprobs": tops}


def test_tokens_show_their_probabilities_and_alternatives(page, server):
    open_settings(page)
    page.check("#probabilities")
    tokens = [token("The", 0.9, ("A", 0.05)), token(" sea", 0.2, (" land", 0.7), ("\n", 0.01))]
    ask(page, server, "Question?", "The", " sea", logprobs={0: tokens[:1], 1: tokens[1:]})
    assert server.completions[0].items() >= {"logprobs": True, "top_logprobs": 5}.items()
    spans = page.locator(".token")
    assert spans.all_text_contents() == ["The", " sea"]
    colours = spans.evaluate_all("all => all.map(span => getComputedStyle(span).backgroundColor)")
    assert len(set(colours)) == 2
    spans.nth(1).hover()
    popup = page.locator("#alternatives")
    expect(popup.locator("tr")).to_have_text(["␣land70.0 %", "␣sea20.0 %", "⏎1.0 %"])
    expect(popup.locator(".chosen")).to_have_text("␣sea20.0 %")
    page.mouse.move(0, 0)
    expect(popup).to_be_hidden()
    spans.nth(0).focus()
    expect(popup.locator("tr")).to_have_text(["The90.0 %", "A5.0 %"])
    page.keyboard.press("ArrowRight")
    expect(spans.nth(1)).to_be_focused()
    expect(popup.locator(".chosen")).to_have_text("␣sea20.0 %")
    reload(page)
    assert spans.all_text_contents() == ["The", " sea"]
    open_settings(page)
    page.uncheck("#probabilities")
    expect(spans).to_have_count(0)
    expect(answers(page)).to_have_text("The sea")
    ask(page, server, "Question?", "ok")
    assert "logprobs" not in server.completions[1]


def test_a_character_of_several_tokens_is_shown_once(page, server):
    open_settings(page)
    page.check("#probabilities")
    data = "🙂".encode()
    tokens = [token(data[:2], 0.5), token(data[2:3], 0.6), token(data[3:], 0.7), token("!", 0.8)]
    ask(page, server, "Question?", "", "🙂", "!", logprobs={0: tokens[:2], 1: tokens[2:3], 2: tokens[3:]})
    assert page.locator(".token").all_text_contents() == ["", "", "🙂", "!"]


# ---------------------------------------------------------------- several conversations, several tabs


def names(page):
    return page.locator("#chats a")


def test_conversations_are_named_switched_renamed_and_deleted(page, server):
    ask(page, server, "What is the speed of the memory, and why does it matter so much here?", "1")
    page.keyboard.press("Control+k")
    expect(answers(page)).to_have_count(0)
    ask(page, server, "Second", "2")
    expect(names(page)).to_have_text(["Second", "What is the speed of the memory, and why…"])
    names(page).nth(1).click()
    expect(answers(page)).to_have_text("1")
    expect(page.locator("#title")).to_have_text("What is the speed of the memory, and why…")
    page.go_back()
    expect(answers(page)).to_have_text("2")
    page.locator("#chats li").nth(0).hover()
    page.get_by_role("button", name="Rename Second").click()
    page.fill("#chats input", "<b>Renamed</b>")
    page.press("#chats input", "Enter")
    expect(names(page).first).to_have_text("<b>Renamed</b>")
    expect(page.locator("#title")).to_have_text("<b>Renamed</b>")
    page.get_by_role("button", name="Delete <b>Renamed</b>").click()
    expect(names(page)).to_have_text(["What is the speed of the memory, and why…"])
    expect(answers(page)).to_have_text("1")
    page.click("text=Undo")
    expect(names(page)).to_have_count(2)
    expect(answers(page)).to_have_text("2")
    reload(page)
    expect(names(page).first).to_have_text("<b>Renamed</b>")


def test_an_answer_goes_on_while_another_conversation_is_open(page, server):
    answer = Answer(["be", "fore", " after"], hold_after=2)
    server.script(answer)
    send(page, "one")
    expect(answers(page)).to_have_text("before")
    page.keyboard.press("Control+k")
    ask(page, server, "two", "2")
    answer.release.set()
    expect(page.locator("#chats >> text=●")).to_have_count(0)
    expect(answers(page)).to_have_text("2")
    page.click("#chats >> text=one")
    expect(answers(page)).to_have_text("before after")


def test_conversations_go_into_a_file_and_come_back(page, server, browser, watch):
    open_settings(page)
    page.fill("#system", "Be brief.")
    page.check("#probabilities")
    ask(page, server, "one", {"reasoning_content": "hm"}, "1", logprobs={1: [token("1", 0.5, ("2", 0.4))]})
    page.keyboard.press("Control+k")
    ask(page, server, "two", "2")
    with page.expect_download() as download:
        page.click("#export")
    data = {"name": "a.json", "mimeType": "application/json", "buffer": download.value.path().read_bytes()}
    page.set_input_files("#import-file", data)
    expect(page.locator("#toast")).to_have_text("2 conversations imported.")
    expect(names(page)).to_have_count(2)  # they are here already
    context = browser.new_context()
    other = watch.page(context.new_page())
    open_page(other, server)
    other.set_input_files("#import-file", data)
    expect(names(other)).to_have_text(["two", "one"])
    names(other).nth(1).click()
    names(page).nth(1).click()
    expect(other.locator("#system")).to_have_value("Be brief.")
    other.evaluate("document.querySelector('#probabilities').click()")
    assert other.locator("#messages").inner_html() == page.locator("#messages").inner_html()
    context.close()


@pytest.mark.parametrize(
    "text", ["", "null", "[]", '{"conversations": 1}', '{"conversations": [{"messages": [null]}]}']
)
def test_a_file_of_something_else_is_refused(page, text):
    page.set_input_files("#import-file", {"name": "b.json", "mimeType": "application/json", "buffer": text.encode()})
    expect(page.locator("#toast")).to_have_text("b.json is not a file of exported conversations.")
    expect(names(page)).to_have_count(0)


def test_a_file_cannot_bring_markup_or_odd_fields(page):
    odd = {"role": "assistant", "content": {"a": 1}, "tokens": [["<b>", 0, 7]], "usage": {"prompt": "<b>"}, "calls": 3}
    store(page, [user("<img src=x onerror=window.ran=1>"), odd | {"times": [], "error": "<b>bold</b>"}])
    expect(page.locator(".failure")).to_contain_text("<b>bold</b>")
    assert page.locator("#messages :is(b, img)").count() == 0 and page.evaluate("window.ran") is None


def test_tabs_keep_each_others_conversations(page, context, server, watch):
    ask(page, server, "one", "1")
    other = watch.page(context.new_page())
    open_page(other, server)
    slow = Answer(["a", "b"], hold_after=1)
    server.script(slow)
    send(page, "slow")
    ask(other, server, "two", "2")
    expect(names(page)).to_have_text([re.compile("two|one"), re.compile("one|two")])
    slow.release.set()
    finished(page)
    ask(other, server, "three", "3")
    for tab in (page, other):
        reload(tab)
    expect(answers(page)).to_have_text(["1", "ab"])
    expect(answers(other)).to_have_text(["2", "3"])
    expect(names(page)).to_have_count(2)


def test_a_conversation_in_two_tabs_is_one_conversation(page, context, server, watch):
    ask(page, server, "one", "1")
    other = watch.page(context.new_page())
    other.goto(page.url)
    expect(answers(other)).to_have_text(["1"])
    slow = Answer(["half", " whole"], hold_after=1)
    server.script(slow)
    send(page, "two")
    expect(answers(other)).to_have_text(["1", "half"])
    ask(other, server, "three", "3")
    slow.release.set()
    expect(answers(page)).to_have_text(["1", "half whole", "3"])
    expect(answers(other)).to_have_text(["1", "half whole", "3"])
    server.script(Answer(["never", "shown"], hold_after=1))
    send(page, "four")
    expect(answers(page).last).to_have_text("never")
    other.get_by_role("button", name="Delete one").dispatch_event("click")
    wait_for(lambda: server.disconnects == 1)
    reload(page)
    expect(names(page)).to_have_count(0)


# ---------------------------------------------------------------- how it looks and is used


def background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_colours_follow_the_system_unless_they_are_chosen(page):
    page.emulate_media(color_scheme="light")
    light = background(page)
    page.emulate_media(color_scheme="dark")
    dark = background(page)
    assert sum(map(int, re.findall(r"\d+", light))) > 600 > 200 > sum(map(int, re.findall(r"\d+", dark)))
    page.click("#theme")
    expect(page.locator("#theme")).to_have_text("Light")
    assert background(page) == light
    reload(page)
    assert background(page) == light
    page.emulate_media(color_scheme="light")
    page.click("#theme")
    assert background(page) == dark
    page.click("#theme")
    expect(page.locator("#theme")).to_have_text("Auto")
    assert background(page) == light


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(page, server, scheme):
    """WCAG's contrast of at least 4.5 between text and what lies behind it."""
    page.emulate_media(color_scheme=scheme)
    ask(
        page,
        server,
        "Question?",
        {"reasoning_content": "Hm."},
        "# Head\n\nText [link](https://example.org) `code`\n\n> quote",
        error_after=2,
    )
    open_settings(page)
    page.fill("#schema", "{")
    low = page.evaluate("""() => {
      const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
      const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
      const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
      const behind = (node) => {
        const colour = numbers(getComputedStyle(node).backgroundColor);
        return colour.length === 4 && colour[3] === 0 ? behind(node.parentElement) : colour;
      };
      const hasText = (node) => [...node.childNodes].some(({ nodeType, data }) => nodeType === 3 && data.trim());
      const contrast = (node) => {
        const both = [light(numbers(getComputedStyle(node).color)), light(behind(node))];
        return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
      };
      const nodes = [...document.querySelectorAll("body *")].filter((node) => hasText(node) && node.checkVisibility());
      return nodes.filter((node) => contrast(node) < 4.5).map((node) => [contrast(node), node.outerHTML.slice(0, 80)]);
    }""")
    assert not low


def test_a_phone(browser, server, watch):
    context = browser.new_context(**PHONE)
    page = watch.page(context.new_page())
    open_page(page, server)
    wide = "| " + " | ".join(["a wide column"] * 12) + " |\n" + "|---" * 12 + "|"
    ask(page, server, "x" * 300, f"{'y' * 400}\n\n```\n{'z' * 300}\n```\n\n{wide}\n\nhttps://example.org/{'w' * 200}")

    def overflow():
        boxes = page.locator("html, #scroller, #composer, .message")
        return boxes.evaluate_all("all => all.some(node => node.scrollWidth > innerWidth)")

    assert not overflow()
    expect(page.locator("#chats-panel")).to_be_hidden()
    page.tap("#open-chats")
    expect(page.locator("#chats-panel")).to_be_visible()
    assert not overflow()
    page.tap("#chats a")
    expect(page.locator("#chats-panel")).to_be_hidden()
    page.tap("#open-settings")
    expect(page.locator("#settings-panel")).to_be_visible()
    assert not overflow()
    sizes = page.locator("input, textarea, select").evaluate_all(
        "all => all.map(node => parseFloat(getComputedStyle(node).fontSize))"
    )
    assert min(sizes) >= 16  # below that, iOS zooms into a field
    page.keyboard.press("Escape")
    expect(page.locator("#settings-panel")).to_be_hidden()
    context.close()


def test_the_keyboard(page, server):
    expect(page.locator("#draft")).to_be_focused()
    page.keyboard.type("line one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line two")
    server.script(Answer("first"))
    page.keyboard.press("Enter")
    finished(page)
    assert server.completions[0]["messages"] == [user("line one\nline two")]
    page.keyboard.press("ArrowUp")
    expect(page.locator("#edit")).to_be_focused()
    page.keyboard.press("End")
    page.keyboard.type("!")
    server.script(Answer("second"))
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text(["second"])
    assert server.completions[1]["messages"] == [user("line one\nline two!")]
    page.keyboard.press("Control+k")
    expect(answers(page)).to_have_count(0)
    expect(page.locator("#draft")).to_be_focused()
    page.keyboard.press("Enter")  # nothing to send
    page.keyboard.type("   ")
    page.keyboard.press("Enter")
    page.keyboard.type("に")  # an input method's Enter chooses a character
    page.locator("#draft").dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    assert len(server.completions) == 2


def test_what_has_the_focus_is_seen(page, server):
    ask(page, server, "Question?", "`code`\n\n```\nblock\n```")
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        focus = page.evaluate("""() => {
          const node = document.activeElement;
          const marked = getComputedStyle(node).outlineStyle !== "none" || node.closest(".field");
          const seen = marked && node.checkVisibility({ opacityProperty: true });
          return [node.tagName, node.ariaLabel ?? node.textContent.slice(0, 20), Boolean(seen)];
        }""")
        if focus[0] != "BODY":
            assert focus[2], focus
        seen.add(focus[1])
    assert {"New chat", "Settings", "Copy", "Edit", "Regenerate", "Message", "Export"} <= seen


def test_an_answer_is_read_out_line_by_line(page, server):
    answer = Answer(["First line.\nSecond", " line.\n", "Third"], hold_after=1)
    server.script(answer)
    send(page, "Question?")
    expect(page.locator("[aria-live=polite] p")).to_have_text(["First line."])
    answer.release.set()
    expect(page.locator("[aria-live=polite]")).to_have_text(re.compile(r"First line\.\s*Second line\.\s*Third"))


def test_it_scrolls_along_only_at_the_end(page, server):
    lines = [f"line {i}\n\n" for i in range(100)]
    answer = Answer([*lines, "the end"], hold_after=100)
    server.script(answer)
    send(page, "Question?")
    expect(page.locator(".answer >> text=line 99")).to_be_in_viewport()
    expect(page.locator("#latest")).to_be_hidden()
    page.mouse.move(600, 300)
    page.mouse.wheel(0, -600)
    expect(page.locator("#latest")).to_be_visible()
    top = page.evaluate("document.querySelector('#scroller').scrollTop")
    answer.release.set()
    finished(page)
    assert page.evaluate("document.querySelector('#scroller').scrollTop") == top
    page.click("#latest")
    expect(page.locator(".answer >> text=the end")).to_be_in_viewport()


# ---------------------------------------------------------------- images

PASTED = """([name, data]) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name, { type: "image/png" }));
  draft.dispatchEvent(new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true }));
}"""


def png(width, height):
    file = io.BytesIO()
    PIL.Image.new("RGBA", (width, height), (250, 10, 10, 255)).save(file, "PNG")
    return file.getvalue()


def shown_to(message):
    """The sizes of a message's images, and its texts."""
    kinds = [part["type"] for part in message["content"]]
    urls = [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
    assert kinds == ["image_url"] * len(urls) + ["text"] * (len(kinds) - len(urls))
    data = [base64.b64decode(url.removeprefix("data:image/jpeg;base64,")) for url in urls]
    images = [PIL.Image.open(io.BytesIO(image)) for image in data]
    assert all(image.getpixel((0, 0))[0] > 240 > 20 > image.getpixel((0, 0))[1] for image in images)
    return [image.size for image in images], [part["text"] for part in message["content"] if part["type"] == "text"]


def test_images_are_shown_to_models_that_see(context, server, watch):
    """From files and from the clipboard, reduced where they are large; they stay in the chat and in its file."""
    server.sees = True
    page = watch.page(context.new_page())
    open_page(page, server)
    expect(page.locator("#attach")).to_be_visible()
    large, broken = png(3000, 1000), b"not an image"
    files = [{"name": f"{i}.png", "mimeType": "image/png", "buffer": x} for i, x in enumerate((large, broken, large))]
    page.set_input_files("#image-file", files)
    expect(page.locator("#toast")).to_contain_text("1.png is not an image")
    expect(page.locator("#attached img")).to_have_count(2)  # they stand in the order in which they are reduced
    page.evaluate(PASTED, ["b.png", base64.b64encode(png(40, 30)).decode()])
    expect(page.locator("#attached img")).to_have_count(3)
    page.locator("#attached button").first.click()
    expect(page.locator("#attached img")).to_have_count(2)
    ask(page, server, "What is it?", "Red.")
    expect(page.locator("#attached img")).to_have_count(0)
    expect(page.locator(".question img")).to_have_count(2)
    assert shown_to(server.completions[-1]["messages"][0]) == ([(1280, 427), (40, 30)], ["What is it?"])
    reload(page)
    expect(page.locator(".question img")).to_have_count(2)
    page.click(".question >> text=Edit")
    page.fill("#edit", "And now?")
    page.press("#edit", "Enter")
    finished(page)
    assert shown_to(server.completions[-1]["messages"][0])[1] == ["And now?"]
    page.evaluate(PASTED, ["c.png", base64.b64encode(png(60, 60)).decode()])
    expect(page.locator("#attached img")).to_have_count(1)
    page.click("#send")  # without a word
    finished(page)
    assert shown_to(server.completions[-1]["messages"][-1]) == ([(60, 60)], [])
    with page.expect_download() as download:
        page.click("#export")
    data = {"name": "a.json", "mimeType": "application/json", "buffer": download.value.path().read_bytes()}
    page.locator("#chats li").first.hover()
    page.get_by_label(re.compile("^Delete")).first.click()
    page.set_input_files("#import-file", data)
    names(page).first.click()
    expect(page.locator(".question img")).to_have_count(3)


def test_no_images_where_the_model_does_not_see(page):
    expect(page.locator("#attach")).to_be_hidden()
    page.evaluate(PASTED, ["b.png", base64.b64encode(png(40, 30)).decode()])
    expect(page.locator("#attached img")).to_have_count(0)


# ---------------------------------------------------------------- the scripted server itself


def test_the_scripted_server_speaks_openai(server):
    """Its answers are what OpenAI's own client takes them for."""
    openai = pytest.importorskip("openai", reason="openai is not installed")
    client = openai.OpenAI(base_url=server.url + "v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["brisk-1b"]
    server.script(Answer(["He", "llo"], usage=(7, 4, 2), logprobs={0: [token("He", 0.5, ("A", 0.2))]}))
    chunks = list(
        client.chat.completions.create(
            model="brisk-1b",
            messages=[user("?")],
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
            top_logprobs=2,
        )
    )
    for chunk in chunks:
        type(chunk).model_validate(chunk.model_dump(), strict=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello"
    assert chunks[1].choices[0].logprobs.content[0].top_logprobs[1].token == "A"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 4 and not chunks[-1].choices
    with pytest.raises(openai.BadRequestError, match="Unrecognized request argument supplied: tempature"):
        client.chat.completions.create(model="brisk-1b", messages=[user("?")], extra_body={"tempature": 1})


# ---------------------------------------------------------------- serve.py with the demo model


@pytest.fixture(scope="module")
def real():
    with Server("--batch_size", 2) as real:
        yield real


@pytest.fixture
def real_page(context, real, watch):
    watch.origin = real.address
    page = watch.page(context.new_page())
    page.goto(real.address)
    expect(page.locator("#model option")).to_have_text(["target"])
    return page


def set_up(page, **values):
    open_settings(page)
    for name, value in values.items():
        page.fill("#setting-" + name, str(value))
    page.click("#close-settings")


def test_a_conversation_with_a_model(real_page, real):
    page = real_page
    set_up(page, max_tokens=24, temperature=0)
    question = 'def read_lines(path):\n    """Yields the lines of a text file that are not empty."""'
    send(page, question)
    finished(page)
    expect(facts(page)).to_have_text(
        re.compile(r"^[\d.]+ tokens/s · \d+\.\d\d s to the first token · prompt \d+( \(\d+ cached\))?, answer 24\b.*$")
    )
    said = answers(page).text_content()
    body = {"messages": [user(question)], "max_tokens": 24, "temperature": 0}
    direct = real.post("/v1/chat/completions", **body)[1]["choices"][0]["message"]["content"]
    assert said and "".join(said.split()) == "".join(direct.split())
    page.locator(".answer").first.hover()
    page.locator(".answer >> text=Regenerate").click()
    finished(page)
    expect(answers(page)).to_have_text([said])
    send(page, "    with open(path) as file:")
    finished(page)
    expect(answers(page)).to_have_count(2)
    before = page.locator("#messages").inner_html()
    reload(page)
    assert page.locator("#messages").inner_html() == before


def test_stopping_a_model(real_page, real):
    page = real_page
    set_up(page, max_tokens=900, min_tokens=900)
    send(page, "import os")
    expect(answers(page)).to_have_text(re.compile(r"\S{3}"))
    expect(page.locator("#stop")).to_be_visible()
    came = answers(page).text_content()
    page.click("#stop")
    finished(page)
    expect(facts(page)).to_contain_text("stopped")
    assert answers(page).text_content().startswith(came)
    real.wait_until_idle(5)
    assert real.metric("brisk_requests_cancelled_total") == 1


def test_markup_from_a_model_stays_text(real_page):
    """Which a schema makes it write."""
    page = real_page
    markup = "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'>"
    open_settings(page)
    page.fill("#schema", json.dumps({"const": markup}))
    page.click("#close-settings")
    send(page, "Question?")
    finished(page)
    expect(answers(page)).to_contain_text(markup)
    reload(page)
    expect(answers(page)).to_contain_text(markup)
    assert page.locator("#messages :is(script, img)").count() == 0 and page.evaluate("window.ran") is None


def test_a_model_that_goes_away_is_said(context, watch):
    watch.expected = ["ERR_"]
    with Server("--batch_size", 1) as real:
        watch.origin = real.address
        page = watch.page(context.new_page())
        page.goto(real.address)
        set_up(page, max_tokens=900, min_tokens=900)
        send(page, "import os")
        expect(answers(page)).to_have_text(re.compile(r"\S{3}"))
        real.process.kill()
        expect(page.locator(".failure")).to_contain_text("The connection to the server was lost.")
        expect(page.locator("#banner")).to_contain_text("does not answer")
        expect(answers(page)).to_have_text(re.compile(r"\S{3}"))
