"""server/pictures.py: images of clients, by data: URLs and from an HTTP server that misbehaves; serve.py by openai."""

import base64
import http.server
import io
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import PIL.Image
import pytest
import transformers
from serving import Server
from test_images import OPTIONS, saved
from vision_models import converted, make, picture

from checkpoint import load_config
from errors import UserError
from images import load_options
from prompts import Target
from server import pictures
from server.api import ChatBody, chat_work, make_model
from server.pictures import fetch, is_public, read_url
from tokenizer import load_tokenizer

openai = pytest.importorskip("openai")

PICTURE = picture(300, 220)
PNG = saved(PICTURE)


def data_url(data: bytes = PNG) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


# ---------------------------------------------------------------------------------------------------------------------
# Addresses


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1",
        "224.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "240.0.0.1", "::1", "::", "fe80::1", "fe80::1%eth0",
        "fc00::1", "fd12::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::", "2001:0:1::", "::127.0.0.1", "2001:db8::1", "not an address",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "2130706433", "127.1", "0x7f000001", "[::ffff:127.0.0.1]", "0", "017700000001"],
)
def test_this_machine_is_not_asked(web, host):
    """However it is spelled."""
    with pytest.raises(UserError, match=r"not on the public internet|cannot be fetched"):
        fetch(f"http://{host}:{web.port}/fine.png")
    assert web.asked == []


@pytest.mark.parametrize(
    "url",
    [
        "http://user@example.com/a.png", "http://user:word@example.com/", "http:///a.png", "http://a b/",
        "http://example.com/\r\nX: y", "http://exämple.com/", "http://example.com:99999/", "ftp://example.com/a.png",
    ],
)  # fmt: skip
def test_urls_that_are_none(url):
    with pytest.raises(UserError) as error:
        fetch(url)
    assert "\n" not in str(error.value)


def test_one_private_address_is_enough(web, monkeypatch):
    """A name with a public address and one of this machine."""
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (x, 80)) for x in ("8.8.8.8", "127.0.0.1")]
    )
    with pytest.raises(UserError, match="not on the public internet"):
        fetch("http://example.com/a.png")


# ---------------------------------------------------------------------------------------------------------------------
# A server, on what then counts as a public address


class Web:
    """What it was asked for, and where it is."""

    def __init__(self):
        self.asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler):
                self.asked.append((handler.path, handler.headers["Host"]))
                self.answer(handler)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, handler):
        name = handler.path.split("?")[0].strip("/")
        if name.startswith("to"):  # redirects
            handler.send_response(302)
            where = {
                "to": "/fine.png",
                "to-itself": "/to-itself",
                "to-private": f"http://localhost:{self.port}/fine.png",
            }
            where |= {"to-file": "file:///etc/passwd"}
            handler.send_header("Location", where[name])
            handler.end_headers()
            return
        handler.send_response(404 if name == "missing" else 200)
        if name not in ("large-unsaid", "slow"):
            size = {"large": 10**9, "short": 10**6}.get(name, len(PNG))
            handler.send_header("Content-Length", str(size))
        handler.end_headers()
        try:
            if name in ("large", "large-unsaid"):
                for _ in range(1000):
                    handler.wfile.write(bytes(2**16))
            elif name == "slow":
                for i in range(600):
                    handler.wfile.write(PNG[i : i + 1])
                    handler.wfile.flush()
                    time.sleep(0.05)
            else:
                handler.wfile.write(PNG)
        except OSError:
            pass


@pytest.fixture
def web():
    web = Web()
    yield web
    web.server.shutdown()
    web.server.server_close()


@pytest.fixture
def public(monkeypatch):
    """The name example.com is this machine's, which is taken for public; others are what they are."""
    look_up = socket.getaddrinfo

    def found(host, *args, **others):
        return look_up("127.0.0.1" if host == "example.com" else host, *args, **others)

    def first(address):
        return address == "127.0.0.1" and names[-1] == "example.com"

    names = []
    public_address = pictures.public_address

    def noted(host, port):
        names.append(host)
        return public_address(host, port)

    monkeypatch.setattr(socket, "getaddrinfo", found)
    monkeypatch.setattr(pictures, "public_address", noted)
    monkeypatch.setattr(pictures, "is_public", first)


def test_fetched(web, public):
    for path in ("fine.png", "fine.png?size=3", "to"):
        assert fetch(f"http://example.com:{web.port}/{path}") == PNG
    assert web.asked[1] == ("/fine.png?size=3", f"example.com:{web.port}")
    image = read_url(f"http://example.com:{web.port}/fine.png", OPTIONS, False, may_fetch=True)
    assert image.key == read_url(data_url(), OPTIONS, False).key


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("missing", "status 404"),
        ("to-itself", "redirects more than 3 times"),
        ("to-private", "not on the public internet"),
        ("to-file", "no plain"),
        ("large", "more than 21.0 MB"),
        ("large-unsaid", "more than 21.0 MB"),
        ("short", "cannot be fetched"),
    ],
)
def test_what_is_not_fetched(web, public, path, word):
    with pytest.raises(UserError, match=word) as error:
        fetch(f"http://example.com:{web.port}/{path}")
    assert "\n" not in str(error.value)
    assert ("/fine.png", f"localhost:{web.port}") not in web.asked


def test_a_slow_server(web, public, monkeypatch):
    monkeypatch.setattr(pictures, "SECONDS", 0.4)
    begun = time.monotonic()
    with pytest.raises(UserError, match="took more than"):
        fetch(f"http://example.com:{web.port}/slow")
    assert time.monotonic() - begun < 2


def test_a_silent_server(public, monkeypatch):
    """Which takes the connection, and says nothing; also where a handshake is expected."""
    monkeypatch.setattr(pictures, "SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for scheme in ("http", "https"):
            with pytest.raises(UserError, match="took more than"):
                fetch(f"{scheme}://example.com:{listener.getsockname()[1]}/")


def test_no_fetching_unless_it_is_allowed(web, public):
    for url in (f"http://example.com:{web.port}/fine.png", "HTTPS://example.com/"):
        with pytest.raises(UserError, match="fetches no images"):
            read_url(url, OPTIONS, False)
    for url in ("file:///etc/passwd", "/etc/passwd", "ftp://example.com/a.png"):
        with pytest.raises(UserError, match="neither"):
            read_url(url, OPTIONS, False, may_fetch=True)
    assert web.asked == []


# ---------------------------------------------------------------------------------------------------------------------
# serve.py


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eyes")
    made = make("qwen2_5_vl", folder / "hf")
    return made, converted(made, folder / "ours")


@pytest.fixture(scope="module")
def server(made):
    with Server("--checkpoint_path", made[1], "--batch_size", 3, "--max_seq_length", 700) as server:
        yield server


def part(url: str, **fields) -> dict:
    return {"type": "image_url", "image_url": {"url": url} | fields}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def ask(server, content, **others):
    settings = dict(model="any", temperature=0, max_tokens=8, extra_body={"ignore_eos": True}) | others
    return server.client().chat.completions.create(messages=[{"role": "user", "content": content}], **settings)


def expected(made, content, shown) -> str:
    """What transformers answers."""
    plain = [{"type": "image"} if part["type"] == "image_url" else part for part in content]
    tokenizer = transformers.AutoTokenizer.from_pretrained(made[0].folder)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": plain}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(chat, add_special_tokens=False).input_ids
    return load_tokenizer(made[1]).decode(made[0].greedy(ids, shown, 8))


def test_data_urls(server, made):
    """One image, two of different sizes, none, all at once; an image again is in the cache."""
    other = picture(60, 90, 2)
    cases = [
        ([text("What is "), part(data_url()), text("?")], [PICTURE]),
        ([part(data_url(saved(other, "JPEG", quality=100, subsampling=0))), part(data_url()), text("These?")], None),
        ([text("Nothing to see.")], []),
    ]
    shown = PIL.Image.open(io.BytesIO(saved(other, "JPEG", quality=100, subsampling=0)))
    cases[1] = cases[1][0], [shown, PICTURE]
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda case: ask(server, case[0]), cases))
    for (content, images), answer in zip(cases, answers, strict=True):
        assert answer.choices[0].message.content == expected(made, content, images)
    again = ask(server, [text("What is "), part(data_url()), text("? And why?")])
    assert again.usage.prompt_tokens_details.cached_tokens > 54  # its pieces
    other_bytes = ask(server, [text("What is "), part(data_url(saved(picture(300, 220, 5)))), text("?")])
    assert other_bytes.usage.prompt_tokens_details.cached_tokens < 54


def test_the_model_says_that_it_sees(server):
    (model,) = server.client().models.list().data
    assert model.input_modalities == ["text", "image"]


def test_several_choices_and_a_stream(server, made):
    content = [part(data_url()), text("x")]
    said = expected(made, content, [PICTURE])
    choices = ask(server, content, n=2).choices
    assert [choice.message.content for choice in choices] == [said] * 2
    chunks = ask(server, content, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ([part("https://example.com/a.png")], "fetches no images"),
        ([part("/etc/passwd")], "neither"),
        ([part("data:image/png;base64,AAAA")], "no image"),
        ([part(data_url(PNG[:500]))], "damaged"),
        ([part(data_url(), detail="most")], "detail"),
        ([{"type": "image_url"}], "image_url"),
        ([{"type": "input_audio", "input_audio": {}}], "'text' or 'image_url'"),
        ([part(data_url())] * 14, "of 14 images"),
        ([part("data:")] * 65, "65 images, more than 64"),
        ([part(data_url()), text("<|image_pad|>")], "2 places for 1 images"),
    ],
)
def test_what_a_client_does_wrong(server, content, word):
    with pytest.raises(openai.BadRequestError, match=word):
        ask(server, content)


def test_a_model_without_eyes(chat_folder):
    target = Target(load_tokenizer(chat_folder), 400, frozenset(), 100, "context")
    body = ChatBody.model_validate({"messages": [{"role": "user", "content": [part(data_url())]}]})
    with pytest.raises(UserError, match="'image_url'; this model takes parts of type 'text' only"):
        chat_work(body, make_model("any", target, {}))


def test_urls_where_they_are_allowed(made, web, public):
    options = load_options(made[1], load_config(made[1]).vision)
    target = Target(load_tokenizer(made[1]), 420, frozenset(), 500, "context", images=options)
    model = make_model("any", target, {}, fetches_images=True)
    content = [part(f"http://example.com:{web.port}/to"), part(data_url(), detail="low"), text("x")]
    body = {"messages": [{"role": "user", "content": content}]}
    (request,) = chat_work(ChatBody.model_validate(body), model).requests
    assert [image.count for image in request.images] == [54, 54]
    assert [path for path, _ in web.asked] == ["/to", "/fine.png"]
    with pytest.raises(UserError, match="fetches no images"):
        chat_work(ChatBody.model_validate(body), make_model("any", target, {}))


def test_system_messages_may_be_merged(made):
    options = load_options(made[1], load_config(made[1]).vision)
    target = Target(load_tokenizer(made[1]), 420, frozenset(), 500, "context", images=options)
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": [part(data_url()), text("x")]}]
    work = chat_work(ChatBody.model_validate({"messages": messages}), make_model("any", target, {}, merges_system=True))
    (request,) = work.requests
    assert [image.count for image in request.images] == [54]
    assert "user\nBe short.\n\n" in target.tokenizer.decode(request.prompt)
