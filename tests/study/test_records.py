from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from chatterbox_lab import released
from chatterbox_lab.study import machine, records


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATTERBOX_LAB_OUTPUT", str(tmp_path))


def test_every_measurement_knows_its_machine() -> None:
    facts = machine.machine_facts("cpu")
    assert facts["device"] == "cpu"
    assert facts["cores"] >= 1
    assert facts["torch"] == torch.__version__.split("+")[0]
    assert facts["transformers"] == "4.46.3"
    assert facts["chatterbox-streaming"] == "0.1.2"
    assert not any(isinstance(value, str) and "/" in value for value in facts.values())


def test_a_record_names_the_chatterbox_that_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chatterbox").mkdir()
    for name in ("__init__.py", "tts.py"):
        (tmp_path / "chatterbox" / name).touch()
    monkeypatch.delitem(sys.modules, "chatterbox")  # else its own place is asked, not sys.path
    monkeypatch.syspath_prepend(tmp_path)
    facts = machine.machine_facts()  # a source tree that nobody has installed
    assert {name: facts.get(name) for name in machine.CHATTERBOX if name in facts} == {"chatterbox": "unknown"}
    beside = tmp_path / "chatterbox_tts-0.1.7.dist-info"
    beside.mkdir()
    (beside / "METADATA").write_text("Metadata-Version: 2.1\nName: chatterbox-tts\nVersion: 0.1.7\n")
    (beside / "top_level.txt").write_text("chatterbox\n")
    released._owner.cache_clear()
    facts = machine.machine_facts()
    assert {name: facts.get(name) for name in machine.CHATTERBOX if name in facts} == {"chatterbox-tts": "0.1.7"}


def git(folder: Path, *arguments: str) -> str:
    named = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *named, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_commit_is_that_of_the_packages_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path.resolve() / "repository"
    installed = repository / "venv" / "site-packages"

    def put(where: Path, data: Path) -> None:
        (where / "chatterbox_lab").mkdir(parents=True, exist_ok=True)
        (where / "chatterbox_lab" / "files.py").write_text("1\n")
        monkeypatch.setattr(machine, "REPOSITORY", where)
        monkeypatch.setattr(machine, "DATA", data)

    put(repository, repository / "data")
    assert machine.commit() == "unknown"  # outside git
    git(repository, "init", "-q")
    assert machine.commit() == "unknown"  # without a commit
    (repository / "application.py").write_text("1\n")
    git(repository, "add", "application.py")
    git(repository, "commit", "-qm", "An application")
    assert machine.commit() == "unknown"  # copied into it
    git(repository, "add", "chatterbox_lab")
    git(repository, "commit", "-qm", "The package")
    assert machine.commit() == git(repository, "rev-parse", "--short", "HEAD")
    (repository / "application.py").write_text("2\n")
    assert machine.commit() == git(repository, "rev-parse", "--short", "HEAD")
    (repository / "chatterbox_lab" / "files.py").write_text("2\n")
    assert machine.commit() == git(repository, "rev-parse", "--short", "HEAD") + "+"
    monkeypatch.setattr(machine, "DATA", repository / "chatterbox_lab" / "data")
    assert machine.commit() == "unknown"  # a wheel
    put(installed, installed / "data")
    assert machine.commit() == "unknown"
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "Everything")
    assert machine.commit() == "unknown"  # part of another repository


def test_two_cpus_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = machine.machine_facts("cpu")
    assert facts["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert facts["bfloat16"] in (True, False)
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "_CPUINFO", cpuinfo)
    cpuinfo.write_text("cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nprocessor : 1\nmodel : 9\n")
    facts = machine.machine_facts()
    assert [facts[name] for name in ("cpu", "cpu_family", "cpu_model")] == ["AMD EPYC", 25, 17]
    for elsewhere in ("Hardware : no names here\n", None):
        cpuinfo.write_text(elsewhere) if elsewhere else cpuinfo.unlink()
        facts = machine.machine_facts()
        assert facts["cpu_family"] == facts["cpu_model"] == ""
        assert facts["cpu"]


def test_a_machine_is_told_with_its_kind_where_the_record_knows_it() -> None:
    old = FACTS | {"cores": 2}
    assert machine.in_words(old) == machine.in_words(old | {"cpu_capability": float("nan")}) == "here, 2 cores"
    assert machine.in_words(old | {"cpu_capability": "AVX2", "bfloat16": False}) == "here with AVX2, 2 cores"
    new = old | {"cpu_capability": "AVX512", "bfloat16": True}
    assert records.described(new | {"model": "lab"}) == "here with AVX512 and bfloat16, 2 cores, lab"
    assert machine.in_words(new | {"device": "cuda", "machine": "GPU"}) == "GPU"
    assert machine.kind_in_words(new | {"cpu_family": 25.0, "cpu_model": 17}).endswith(", family 25, model 17")
    for unknown in ("", None, float("nan")):
        untold = {"cpu_family": unknown, "cpu_model": unknown}
        assert machine.kind_in_words(new | untold) == machine.in_words(new)
    assert machine.kind_in_words(new | {"device": "cuda", "machine": "GPU", "cpu_family": 25}) == "GPU"


@pytest.mark.parametrize("kind", ["data", "figures"])
def test_a_run_writes_to_build_unless_told_otherwise(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert records.output_folder(kind) == tmp_path / kind
    monkeypatch.delenv("CHATTERBOX_LAB_OUTPUT")
    monkeypatch.setattr(records, "REPOSITORY", tmp_path)
    assert records.output_folder(kind) == tmp_path / "build" / kind


def test_results_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pd.DataFrame({"rtf": [0.5, 0.6]})
    path = records.save_results(table, "runs", {"machine": "here"})
    assert path == tmp_path / "data" / "runs.csv"
    before = path.read_bytes()

    def half(self: pd.DataFrame, target: Path, **_: Any) -> None:
        target.write_text("rtf\n0.")
        raise KeyboardInterrupt

    monkeypatch.setattr(pd.DataFrame, "to_csv", half)
    with pytest.raises(KeyboardInterrupt):
        records.save_results(table, "runs", {})
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["runs.csv"]


def test_a_missing_record_names_what_there_is() -> None:
    assert "4.46.3" in set(records.load_results("transformers")["transformers"])
    with pytest.raises(FileNotFoundError, match=r"'nothing'.*transformers"):
        records.load_results("nothing")


FACTS = {"device": "cpu", "machine": "here", "torch": "2.6.0", "date": "2026-01-01"}


def test_a_record_keeps_the_last_complete_file_until_it_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("round\n7\n")
    record = records.Record(path)
    record.add([{"round": 0} | FACTS])
    assert path.read_text() == "round\n7\n"
    with pytest.raises(ValueError, match=r"runs\.unfinished\.csv"):
        records.Record(path)
    again = records.Record(path, resume=True)
    again.add([{"round": 1} | FACTS])
    assert pd.read_csv(again.finish())["round"].tolist() == [0, 1]
    assert [file.name for file in tmp_path.iterdir()] == ["runs.csv"]


def test_a_record_mixes_no_machines(tmp_path: Path) -> None:
    record = records.Record(tmp_path / "runs.csv")
    record.add([{"round": 0} | FACTS])
    record.check(FACTS | {"date": "2026-01-02"})
    record.check(FACTS | {"device": "cuda", "torch": "2.11.0"})
    with pytest.raises(ValueError, match=r"torch 2\.6\.0, here it is 2\.11\.0"):
        record.check(FACTS | {"torch": "2.11.0"})


AVX512 = {"cpu_family": 25, "cpu_model": 17, "cpu_capability": "AVX512", "bfloat16": True}
AVX2 = {"cpu_family": 25, "cpu_model": 1, "cpu_capability": "AVX2", "bfloat16": False}


def test_a_record_mixes_no_kinds_of_cpu_and_old_ones_go_on(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    record = records.Record(path)
    record.add([{"round": 0} | FACTS])  # made before the kind was kept
    record.check(FACTS | AVX512)
    record.add([{"round": 1} | FACTS | AVX512])
    again = records.Record(path, resume=True)  # 25 has become 25.0 beside an empty field
    again.check(FACTS | AVX512)
    with pytest.raises(ValueError, match=r"runs\.csv was measured with (cpu_model|cpu_capability|bfloat16) "):
        again.check(FACTS | AVX2)
    record = records.Record(tmp_path / "elsewhere.csv")
    elsewhere = FACTS | AVX512 | {"cpu_family": "", "cpu_model": ""}  # a system that does not tell
    record.add([{"round": 0} | elsewhere])
    records.Record(tmp_path / "elsewhere.csv", resume=True).check(elsewhere)


def test_verdicts_are_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    later = "not measured on a GPU yet"
    findings = [("it is fast", True, "0.5"), ("it is free", False, "7"), ("it is green", later, "so", "a GPU")]
    table = records.conclude("00_test", findings, {"machine": "here"})
    assert table["verdict"].tolist() == ["reproduced", "not reproduced", later]
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == [
        "general:", "0.5", "7", "GPU:", "so",
    ]  # fmt: skip
    kept = pd.read_csv(tmp_path / "data" / "00_verdicts.csv")
    assert kept["verdict"].tolist() == table["verdict"].tolist()
    assert set(kept["notebook"]) == {"00_test"}


def test_one_machine_of_each_kind_is_the_first_of_it() -> None:
    kinds = {"AMD EPYC": "cpu", "H100": "cuda", "Intel Xeon": "cpu", "H200": "cuda", "AMD EPYC, again": "cpu"}
    tables = {name: pd.DataFrame({"device": [kind] * 2, "machine": name.split(",")[0]}) for name, kind in kinds.items()}
    found = records.one_of_each_kind(tables)
    assert list(found) == ["AMD EPYC", "H100", "Intel Xeon"]
    assert found["H100"] is tables["H100"]


def test_records_of_one_kind_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "REPOSITORY", tmp_path)
    (tmp_path / "data").mkdir()
    facts = FACTS | {"cores": 2, "model": "random", "dtype": "float32", "commit": "0012345"}
    for name, more in {
        "cpu": {},
        "gpu_2.6": {"machine": "GPU", "device": "cuda"},
        "gpu_2.11": {"machine": "GPU", "device": "cuda"},
        "plain": {"watermark": False},
        "cpu.unfinished": {"machine": "half"},
    }.items():
        pd.DataFrame([{"rtf": 1.0} | facts | more]).to_csv(tmp_path / "data" / f"bench_{name}.csv", index=False)
    found = records.recorded("bench").set_index("file")
    assert found["record"].to_dict() == {
        "bench_cpu": "here, 2 cores, random, float32",
        "bench_gpu_2.11": "GPU, random, float32 (bench_gpu_2.11)",
        "bench_gpu_2.6": "GPU, random, float32 (bench_gpu_2.6)",
        "bench_plain": "here, 2 cores, random, float32, no watermark",
    }
    assert set(found["commit"]) == {"0012345"}
    plain = records.recorded("bench", leave_out=["dtype", "watermark"]).set_index("file")["record"]
    assert plain["bench_plain"] == "here, 2 cores, random (bench_plain)"
    with pytest.raises(FileNotFoundError, match=r"layers_\*\.csv"):
        records.recorded("layers")
