import contextlib
import json
import types

from richhf_jax.annotate import answers
from richhf_jax.benchmarks import annotate as annotate_benchmark
from richhf_jax.benchmarks.annotate import Acknowledged


def test_raters_at_once_while_the_server_is_killed(tmp_path, capsys):
    path = tmp_path / "figures.json"
    annotate_benchmark.main(
        ["--raters=5", "--items=40", "--answers=2", "--kills=2", "--seed=8", f"--json={path}"]
    )
    figures = json.loads(path.read_text())
    assert (figures["kills"], figures["lost"], figures["with_more"]) == (2, 0, 0)
    assert figures["tries_again"] > 0
    assert figures["with_exactly"] == 40 - figures["skipped_by_two"]
    assert figures["with_fewer"] == figures["skipped_by_two"]
    # Each answer takes a next, an image, two saves and an end.
    assert figures["requests"] >= 5 * 2 * figures["with_exactly"]
    for kind in ("next", "image", "save", "done"):
        assert 0 < figures["milliseconds"][kind]["median"] <= figures["milliseconds"][kind]["p95"]
    printed = capsys.readouterr().out
    assert "2 kills: 0 acknowledged answers lost" in printed
    assert f"{figures['with_exactly']} images have exactly 2 answers, 0 more" in printed


def test_what_the_database_lacks_is_lost(tmp_path):
    with contextlib.closing(annotate_benchmark.make_project(tmp_path, 4, 3, 0)) as store:
        person = store.person(store.add_rater("ann"))
        given = {}
        for state in ("done", "skipped", "draft"):
            work = store.next_item(person)
            answer = answers.empty(work.item.prompt) | {"comment": state}
            answer["nothing"] = dict.fromkeys(answer["nothing"], True)
            answer["ratings"] = dict.fromkeys(answer["ratings"], 3)
            assert store.save(person, work.item.id, 0, answer, 1) == 1
            if state == "done":
                store.finish(person, work.item.id, 1, answer, 1)
            elif state == "skipped":
                store.skip(person, work.item.id, 1, "why", False)
            given[work.item.id] = Acknowledged(1 + (state != "draft"), state, answer)

        def lost(changes):
            rater = types.SimpleNamespace(name="ann", acknowledged=given | changes)
            return annotate_benchmark.count_lost(store, [rater])

        done, skipped, draft = given
        assert lost({}) == 0
        # The server may have more than it could tell.
        assert lost({draft: Acknowledged(0, "draft", {})}) == 0
        assert lost({done: Acknowledged(1, "draft", {})}) == 0
        # But not less, or another answer.
        assert lost({draft: Acknowledged(2, "draft", given[draft].answer)}) == 1
        assert lost({draft: Acknowledged(1, "draft", given[draft].answer | {"comment": ""})}) == 1
        assert lost({draft: Acknowledged(1, "done", given[draft].answer)}) == 1
        assert lost({done: Acknowledged(2, "done", given[draft].answer), skipped: given[done]}) == 2
        assert lost({"another": given[done]}) == 1
