"""The page on which people judge: real sockets; who gets in, what is told, and what is on the disk."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from core_training.data.records import Record
from evaluation.items import Item, Task
from evaluation.pairs.contest import Contest
from evaluation.pairs.pair_judges import judge_name
from evaluation.pairs.pairwise import Shown
from evaluation.pairs.people.desk import Desk, annotator_names
from evaluation.pairs.people.server import PeopleServer, serving
from evaluation.pairs.verdicts import KeptLooks

HOSTILE = "</script><img src=x onerror=alert(1)>"


def contest_in(folder: Path, orders: int = 1) -> Contest:
    """Two models' answers to three prompts; to the third they are the same."""
    items = [
        Item(str(n), Record({}, Path("prompts.jsonl"), n), "", prompt=[{"role": "user", "content": f"Q{n} {HOSTILE}"}])
        for n in range(3)
    ]
    pairs = [
        Shown(item, "runs/secret-sft", "runs/secret-ppo", (f"sft says {n}", f"ppo says {n}"))
        for n, item in enumerate(items[:2])
    ]
    pairs.append(Shown(items[2], "runs/secret-sft", "runs/secret-ppo", ("same", "same")))
    models = ("runs/secret-sft", "runs/secret-ppo")
    task = Task("prompts", items, ())
    return Contest(models, task, judge_name("people"), folder, pairs, [], KeptLooks(folder), orders=orders)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PeopleServer]:
    with serving(Desk(contest_in(tmp_path), ["ann", "bob"], twice=False)) as found:
        yield found


@contextmanager
def client_of(server: PeopleServer, name: str) -> Iterator[httpx.Client]:
    """A browser that has followed the person's link."""
    address = f"http://127.0.0.1:{server.port}"
    with httpx.Client(base_url=address, follow_redirects=True, trust_env=False) as client:
        assert client.get(server.links()[name]).status_code == 200
        yield client


def test_a_person_judges_all_pairs_that_differ_and_each_verdict_is_on_the_disk_at_once(server, tmp_path):
    with client_of(server, "ann") as ann:
        for done in range(2):
            state = ann.get("/look").json()
            assert (state["done"], state["total"]) == (done, 2)
            choice = 1 if state["look"]["first"].startswith("sft") else 2
            after = ann.post("/verdict", json={"look": state["look"]["number"], "choice": choice}).json()
            rows = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
            assert len(rows) == done + 1 == after["done"]
            assert rows[-1]["winner"] == "runs/secret-sft"
            assert rows[-1]["by"] == "ann"
        assert ann.get("/look").json()["look"] is None
    assert not server.desk.is_done  # bob has not judged
    outcomes = [one for _, one in contest_in(tmp_path).outcomes()]
    assert [one.share for one in outcomes] == [1.0, 1.0, 0.5]
    assert outcomes[2].identical


def test_nothing_that_is_sent_names_a_model(server):
    with client_of(server, "ann") as ann:
        sent = [ann.get(path) for path in ("/", "/page.js", "/page.css", "/look", "/look?number=1")]
    assert all("secret" not in one.text and "secret" not in str(one.headers) for one in sent)


def test_two_people_see_opposite_orders(server):
    with client_of(server, "ann") as ann, client_of(server, "bob") as bob:
        firsts = [
            {look["prompt"][0]["content"]: look["first"] for look in looks}
            for looks in ([who.get(f"/look?number={n}").json()["look"] for n in range(2)] for who in (ann, bob))
        ]
    assert firsts[0].keys() == firsts[1].keys()
    assert all(firsts[0][prompt] != firsts[1][prompt] for prompt in firsts[0])


def test_a_verdict_can_be_given_again_and_the_last_one_counts(server, tmp_path):
    with client_of(server, "ann") as ann:
        number = ann.get("/look").json()["look"]["number"]
        for choice in (1, 2, 0):
            assert ann.post("/verdict", json={"look": number, "choice": choice}).json()["done"] == 1
    assert [look.winner for look in contest_in(tmp_path).looks()] == ["tie"]


def test_a_sitting_goes_on_where_the_last_one_ended(tmp_path):
    with serving(Desk(contest_in(tmp_path), ["ann"], twice=True)) as server, client_of(server, "ann") as ann:
        first = ann.get("/look").json()["look"]
        ann.post("/verdict", json={"look": first["number"], "choice": 1})
        expected = ann.get("/look").json()
    desk = Desk(contest_in(tmp_path), ["ann"], twice=True)
    assert desk.annotators[0].state() == expected
    assert desk.progress == (1, 4)
    with serving(desk) as server:
        old = httpx.get(f"http://127.0.0.1:{server.port}/enter/{'x' * 32}", trust_env=False)
        assert old.status_code == 403


def test_the_cookie_is_for_this_server_alone(server):
    answer = httpx.get(server.links()["ann"], trust_env=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"fedloom-compare-{server.port}=")
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie


@pytest.mark.parametrize("path", ["/", "/look", "/verdict"])
def test_nobody_without_a_link_sees_anything(server, path):
    method = "POST" if path == "/verdict" else "GET"
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as stranger:
        assert stranger.request(method, path).status_code == 403
        stranger.cookies.set(f"fedloom-compare-{server.port}", "guessed")
        assert stranger.request(method, path, json={"look": 0, "choice": 1}).status_code == 403


def test_every_answer_carries_the_strict_policy(server):
    with client_of(server, "ann") as ann:
        answers = [ann.get(path) for path in ("/", "/page.js", "/page.css", "/look", "/nothing")]
        answers.append(ann.post("/verdict", content=b"x"))
        answers.append(ann.get("/", headers={"host": "evil.example"}))
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "", "localhost.evil.example:{port}"])
def test_a_name_that_was_made_to_resolve_to_loopback_is_refused(server, host):
    with client_of(server, "ann") as ann:
        assert ann.get("/look", headers={"host": host.format(port=server.port)}).status_code == 421
        assert ann.get("/look", headers={"host": f"localhost:{server.port}"}).status_code in (200, 403)


def test_a_request_of_another_page_is_refused(server, tmp_path):
    with client_of(server, "ann") as ann:
        body = {"look": 0, "choice": 1}
        assert ann.post("/verdict", json=body, headers={"origin": "http://evil.example"}).status_code == 403
        assert ann.post("/verdict", json=body, headers={"origin": "null"}).status_code == 403
        own = {"origin": f"http://127.0.0.1:{server.port}"}
        plain = {"content-type": "text/plain", **own}  # what a form of another page could send without asking
        assert ann.post("/verdict", content=json.dumps(body), headers=plain).status_code == 415
        assert not (tmp_path / "verdicts.jsonl").exists()
        assert ann.post("/verdict", json=body, headers=own).status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b"7", b'{"look": 9, "choice": 1}', b'{"look": -1, "choice": 1}', b'{"look": 0, "choice": 3}',
     b'{"look": 0, "choice": true}', b'{"look": "0", "choice": 1}', b"[" * 900, b"\xff"],
)  # fmt: skip
def test_what_is_no_verdict_is_refused_and_nothing_is_written(server, tmp_path, body):
    with client_of(server, "ann") as ann:
        answer = ann.post("/verdict", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert not (tmp_path / "verdicts.jsonl").exists()


def test_a_large_request_is_not_read_to_its_end(server):
    with client_of(server, "ann") as ann:
        answer = ann.post("/verdict", content=b" " * 5000, headers={"content-type": "application/json"})
    assert answer.status_code == 413


def test_texts_come_as_json_and_the_page_sets_no_html(server):
    with client_of(server, "ann") as ann:
        look = ann.get("/look")
        script, html = ann.get("/page.js").text, ann.get("/").text
    assert look.headers["content-type"].startswith("application/json")
    assert HOSTILE in look.json()["look"]["prompt"][0]["content"]
    assert HOSTILE not in html
    assert "innerHTML" not in script
    assert "<script>" not in html  # no script within the page: the policy would stop it
    assert "style=" not in html


def test_the_page_listens_on_loopback_alone_and_a_taken_port_is_told(server, tmp_path):
    from core_training.foundation.errors import InputError

    with (
        pytest.raises(InputError, match=f"--port {server.port}: cannot be listened on"),
        serving(server.desk, server.port),
    ):
        pass
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.2:{server.port}/", trust_env=False)


def test_whoever_waits_for_the_end_is_woken(server):
    ended = threading.Event()

    def wait() -> None:
        while not server.desk.is_done:
            server.changed.wait(5)
            server.changed.clear()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    for name in ("ann", "bob"):
        with client_of(server, name) as who:
            for number in range(2):
                who.post("/verdict", json={"look": number, "choice": 0})
    assert ended.wait(5)


def test_two_host_headers_are_refused(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.putrequest("GET", "/look", skip_host=True)
    for host in (f"127.0.0.1:{server.port}", "evil.example"):
        connection.putheader("Host", host)
    connection.endheaders()
    assert connection.getresponse().status in (400, 421)
    connection.close()


@pytest.mark.parametrize(
    ("names", "said"),
    [([], "give a name"), (["", " "], "give a name"), (["ann", "ann"], "ann is given twice"), (["<b>"], "is no name")],
)  # fmt: skip
def test_names_that_are_none_are_refused(names, said):
    with pytest.raises(Exception, match=f"--annotators: .*{said}"):
        annotator_names(names)
