"""``dpnp-prior`` from end to end; the Hub is a small server on this machine that speaks the part of its HTTP interface that is used."""

import base64
import dataclasses
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import constants

from dpnp_shared.networks import UNet
from dpnp_shared.preconditioning import EDM
from dpnp_shared.prior import Prior, PriorCard, PriorError, describe
from dpnp_shared.randomness import derive_seed
from dpnp_training.export import round_weights
from dpnp_training.prior_cli import main
from dpnp_training.verify import ValidationRecord, denoising_errors

TOKEN = "hf_" + "secret" * 5
SHAPE = (1, 8, 6)


def make(seed=0, shape=SHAPE, **card) -> Prior:
    torch.manual_seed(seed)
    network = UNet(shape[0], widths=(8, 8), blocks=1, attention=(1,), head_channels=4, embedding=8)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    card = {"name": "test", "image_shape": shape, "sigma_range": (0.02, 50.0), "license": "MIT", **card}
    return Prior(network.eval().requires_grad_(False), EDM(), PriorCard(**card))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder():
    return make().save_pretrained("prior", files={"samples.png": b"a picture"})


def fails(arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert re.search(message, str(caught.value.code)), caught.value.code
    assert TOKEN not in str(caught.value.code)


# --- the Hub ------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """Repositories in memory: branch -> commit, commit -> files."""

    repositories: dict
    lfs: dict
    large_files: bool
    requests: list

    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", headers=None):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = b""
        while size := int(self.rfile.readline(), 16):
            chunks += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return chunks

    def refuse(self, status, code):
        self.reply(status, {"error": code}, {"X-Error-Code": code})

    def serve(self):
        path = unquote(urlsplit(self.path).path)
        body = self.body()
        type(self).requests.append((self.command, path))
        user = {f"Bearer {TOKEN}": "organisation"}.get(self.headers.get("Authorization"))
        for pattern, handler in ROUTES:
            match = re.fullmatch(pattern, f"{self.command} {path}")
            if match:
                if user is None and (self.command == "POST" or "Authorization" in self.headers):
                    return self.reply(401, {"error": "Invalid username or password."})
                return handler(self, body, user, **match.groupdict())
        return self.refuse(404, "NoSuchRoute")

    do_GET = do_HEAD = do_POST = do_PUT = serve  # noqa: N815 - the names that http.server calls

    def repository(self, name, user):
        """The repository, if it exists and may be read; else the refusal was sent."""
        found = self.repositories.get(name)
        if found is None or (found["private"] and user is None):
            self.refuse(404 if user else 401, "RepoNotFound")
            return None
        return found

    def create(self, body, user):
        asked = json.loads(body)
        if asked["organization"] != user:
            return self.reply(403, {"error": f"You don't have the rights, {TOKEN}"})
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repositories:
            return self.reply(409, {"error": "You already created this model repo", "url": f"{self.address}/{name}"})
        private = asked.get("visibility") == "private" or asked.get("private", False)
        self.repositories[name] = {"private": private, "branches": {"main": "0" * 40}, "commits": {"0" * 40: {}}}
        return self.reply(200, {"url": f"{self.address}/{name}", "name": name, "id": "1"})

    @property
    def address(self):
        return f"http://{self.headers['Host']}"

    def info(self, body, user, name, revision="main"):
        found = self.repository(name, user)
        if found is None:
            return None
        commit = found["branches"].get(revision, revision)
        if commit not in found["commits"]:
            return self.refuse(404, "RevisionNotFound")
        siblings = [{"rfilename": file} for file in found["commits"][commit]]
        return self.reply(200, {"id": name, "sha": commit, "private": found["private"], "siblings": siblings})

    def branch(self, body, user, name, revision):
        found = self.repository(name, user)
        if revision in found["branches"]:
            return self.refuse(409, "BranchExists")
        found["branches"][revision] = found["branches"]["main"]
        return self.reply(200, {})

    def validate(self, body, user):
        matter = yaml.safe_load(json.loads(body)["content"].split("---")[1])
        wrong = [key for key in ("library_name", "license", "tags") if key not in matter]
        return self.reply(400 if wrong else 200, {"errors": [{"message": key} for key in wrong], "warnings": []})

    def preupload(self, body, user, name, revision):
        def mode(path):
            return "lfs" if self.large_files and path.endswith(".safetensors") else "regular"

        files = json.loads(body)["files"]
        return self.reply(
            200, {"files": [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in files]}
        )

    def batch(self, body, user, name):
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.address}/lfs/{o['oid']}"}}}
            for o in json.loads(body)["objects"]
        ]
        return self.reply(200, {"transfer": "basic", "objects": objects})

    def put(self, body, user, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.lfs[oid] = body
        return self.reply(200)

    def commit(self, body, user, name, revision):
        found = self.repository(name, user)
        files = dict(found["commits"][found["branches"][revision]])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.lfs[line["value"]["oid"]]
            else:
                assert line["key"] == "header"
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        found["commits"][commit], found["branches"][revision] = files, commit
        return self.reply(200, {"commitUrl": f"{self.address}/{name}/commit/{commit}", "commitOid": commit})

    def tree(self, body, user, name, revision):
        found = self.repository(name, user)
        files = found["commits"].get(revision)
        if files is None:
            return self.refuse(404, "RevisionNotFound")
        return self.reply(
            200,
            [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
            ],
        )

    def resolve(self, body, user, name, revision, file):
        found = self.repository(name, user)
        content = found["commits"][revision][file]
        return self.reply(200, content, {"ETag": hashlib.sha1(content).hexdigest(), "X-Repo-Commit": revision})


MODEL = r"(?P<name>[\w.-]+/[\w.-]+)"
ROUTES = [
    ("POST /api/repos/create", Hub.create),
    ("POST /api/validate-yaml", Hub.validate),
    (f"GET /api/models/{MODEL}", Hub.info),
    (f"GET /api/models/{MODEL}/revision/(?P<revision>.+)", Hub.info),
    (f"GET /api/models/{MODEL}/tree/(?P<revision>.+)", Hub.tree),
    (f"POST /api/models/{MODEL}/branch/(?P<revision>.+)", Hub.branch),
    (f"POST /api/models/{MODEL}/preupload/(?P<revision>.+)", Hub.preupload),
    (f"POST /api/models/{MODEL}/commit/(?P<revision>.+)", Hub.commit),
    (rf"POST /{MODEL}\.git/info/lfs/objects/batch", Hub.batch),
    ("PUT /lfs/(?P<oid>.+)", Hub.put),
    (f"(?:HEAD|GET) /{MODEL}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", Hub.resolve),
]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    kind = type("Hub", (Hub,), {"repositories": {}, "lfs": {}, "large_files": False, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    kind.server = server
    yield kind
    server.shutdown()
    thread.join()
    server.server_close()


def commit_in(text):
    return re.search(r"organisation/name@([0-9a-f]{40})", text)[1]


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # between huggingface_hub and its HTTP client
@pytest.mark.parametrize("large_files", [False, True])
def test_push_and_pull(hub, folder, capsys, large_files):
    hub.large_files = large_files
    (folder / "notes.txt").write_text("mine alone")
    main(["push", "prior", "organisation/name", "--message", "first"])
    out, err = capsys.readouterr()
    commit = commit_in(out)
    assert TOKEN not in out + err
    stored = hub.repositories["organisation/name"]
    assert not stored["private"]
    assert sorted(stored["commits"][commit]) == ["README.md", "config.json", "model.safetensors", "samples.png"]
    assert bool(hub.lfs) == large_files
    assert json.loads((folder / "hub.json").read_text())["commit"] == commit

    main(["pull", "organisation/name", "copy"])
    assert commit_in(capsys.readouterr().out) == commit
    for name in stored["commits"][commit]:
        assert Path("copy", name).read_bytes() == (folder / name).read_bytes()
    assert json.loads(Path("copy/hub.json").read_text()) == json.loads((folder / "hub.json").read_text())
    main(["inspect", "copy"])
    assert f"organisation/name@{commit} on the Hub" in capsys.readouterr().out

    prior = Prior.from_pretrained("organisation/name", revision=commit)
    assert prior.origin == f"organisation/name@{commit}"
    assert Prior.from_pretrained(f"organisation/name@{commit}").card == prior.card
    assert prior.card == dataclasses.replace(make().card, sha256=prior.card.sha256)


def test_a_pinned_revision_stays_what_it_was(hub, folder, capsys):
    main(["push", "prior", "organisation/name"])
    first = commit_in(capsys.readouterr().out)
    make(seed=1).save_pretrained("prior")
    main(["push", "prior", "organisation/name"])
    second = commit_in(capsys.readouterr().out)
    assert first != second
    old, new = (Prior.from_pretrained("organisation/name", revision=r) for r in (first, None))
    assert old.origin.endswith(first)
    assert new.origin.endswith(second)
    assert old.card.sha256 != new.card.sha256
    # a folder that was pulled is brought up to date, one that was changed since is left alone
    main(["pull", "organisation/name", "copy", "--revision", first])
    main(["pull", "organisation/name", "copy"])
    assert Prior.from_pretrained("copy").card.sha256 == new.card.sha256
    make(seed=2).save_pretrained("copy")
    fails(["pull", "organisation/name", "copy"], "did not come from organisation/name")
    # what the cache holds can be loaded without the Hub
    hub.repositories.clear()
    assert Prior.from_pretrained("organisation/name", revision=first).card == old.card


def test_private_repositories_and_branches(hub, folder, capsys, monkeypatch):
    main(["push", "prior", "organisation/name", "--private", "--revision", "trial"])
    commit = commit_in(capsys.readouterr().out)
    stored = hub.repositories["organisation/name"]
    assert stored["private"]
    assert stored["branches"] == {"main": "0" * 40, "trial": commit}
    main(["pull", "organisation/name", "copy", "--revision", "trial"])
    assert commit_in(capsys.readouterr().out) == commit
    fails(["pull", "organisation/name", "other"], r"revision 'main' holds none of config\.json")
    stored["private"] = False
    fails(["push", "prior", "organisation/name", "--private"], "exists and is public; nothing was pushed")
    monkeypatch.delenv("HF_TOKEN")
    stored["private"] = True
    fails(["pull", "organisation/name", "other", "--revision", "v2"], "no such repository, or a private one.*HF_TOKEN")
    assert not Path("other").exists()


def test_refusals_say_what_to_do(hub, folder, monkeypatch):
    fails(["pull", "organisation/nothing", "other"], "no such repository, or a private one")
    fails(["push", "prior", "others/name"], "needs a token with write access")
    fails(["push", "prior", "name"], "needed is 'organisation/name'")
    fails(["push", "nothing", "organisation/name"], "'nothing' is not the folder of a prior")
    main(["push", "prior", "organisation/name"])
    fails(["pull", "organisation/name", "other", "--revision", "v9"], "there is no revision 'v9'")
    with pytest.raises(PriorError, match="there is no revision 'v9'"):
        Prior.from_pretrained("organisation/name", revision="v9")
    fails(["pull", "organisation/..name", "other"], "refused: ")
    Path("thesis").mkdir()
    Path("thesis/thesis.tex").write_text("precious")
    fails(["pull", "organisation/name", "thesis"], "not a prior's folder")
    monkeypatch.setenv("HF_TOKEN", "hf_expired_token")
    fails(["push", "prior", "organisation/name"], "not logged in, or the token is no longer valid")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    fails(["pull", "organisation/name", "other", "--revision", "v1"], "cannot be reached")
    fails(["push", "prior", "organisation/name"], "cannot be reached")
    assert not Path("other").exists()


def test_what_was_changed_on_the_way_is_refused(hub, folder, capsys):
    main(["push", "prior", "organisation/name"])
    files = hub.repositories["organisation/name"]["commits"][commit_in(capsys.readouterr().out)]
    files["model.safetensors"] = files["model.safetensors"][:-1] + b"x"
    fails(["pull", "organisation/name", "copy"], "SHA-256.*was changed or damaged")
    assert not Path("copy").exists()
    # nor is a folder pushed that is not in order
    (folder / "README.md").write_text("the best prior ever")
    fails(["push", "prior", "organisation/name"], r"was not pushed: README\.md: not as it was written")


# --- verify and measure ---------------------------------------------------------------------------------------


@pytest.fixture
def data():
    x = np.random.default_rng(0).integers(0, 256, (40, 8, 6), dtype=np.uint8)
    np.save("x.npy", x)
    return torch.from_numpy(x).float()[:, None] / 127.5 - 1


MEASURE = ["measure", "prior", "x.npy", "--images", "20", "--batch_size", "8"]


def test_measured_figures_are_measured_again(folder, data, capsys):
    main(["verify", "prior"])  # without data: what can be checked
    out = capsys.readouterr().out
    assert "figures: not measured, no data was given" in out
    assert "all of it holds" in out
    with pytest.raises(SystemExit):
        main(["verify", "prior", "--data", "x.npy"])
    assert "WRONG figures: the card has no denoising errors" in capsys.readouterr().out

    before = Prior.from_pretrained("prior")
    main(MEASURE)
    assert "on 24 images" in capsys.readouterr().out  # whole batches
    prior = Prior.from_pretrained("prior")
    assert prior.card.sha256 == before.card.sha256
    assert (folder / "samples.png").exists()
    low, high = 0.2, 0.6
    value = prior.card.metrics["val/mse/0.2-0.6"]
    # the same by hand: an error that grows with σ lies between those at the band's ends
    w = torch.randn(data.shape, generator=torch.Generator().manual_seed(1))
    ends = [float((prior(data + s * w, s) - data).square().mean()) for s in (low, high)]
    assert 0.9 * min(ends) < value < 1.1 * max(ends)

    main(["verify", "prior", "--data", "x.npy", "--tolerance", "1e-5"])
    assert capsys.readouterr().out.count("ok    denoising error") == 6
    Path("elsewhere").mkdir()
    Path("x.npy").rename("elsewhere/y.npy")
    main(["verify", "prior", "--data", "elsewhere/y.npy"])


def test_a_figure_that_does_not_hold_is_found(folder, data, capsys):
    main(MEASURE)
    prior = Prior.from_pretrained("prior")
    prior.card.metrics["val/mse/0.6-2"] *= 1.02
    prior.save_pretrained("prior")
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["verify", "prior", "--data", "x.npy"])
    assert caught.value.code == 1
    out = capsys.readouterr().out
    assert out.count("WRONG") == 1
    assert "WRONG denoising error, σ 0.6 to 2" in out
    assert "1 of 11 do not hold" in out
    main(["verify", "prior", "--data", "x.npy", "--tolerance", "0.03"])


def test_other_images_are_recognised(folder, data, capsys):
    main(MEASURE)
    np.save("x.npy", np.load("x.npy")[::-1])
    with pytest.raises(SystemExit):
        main(["verify", "prior", "--data", "x.npy"])
    out = capsys.readouterr().out
    assert "WRONG data: not the images" in out
    assert out.count("WRONG") == 1  # within the Monte Carlo error they are images like them
    np.save("x.npy", np.load("x.npy")[:10])
    fails(["verify", "prior", "--data", "x.npy"], "holds 10 validation images; .* 3 batches of 8")
    np.save("x.npy", np.zeros((40, 8, 8), dtype=np.uint8))
    main(MEASURE[:3])  # brought to the prior's shape


def test_other_weights_do_not_have_these_figures(folder, data, capsys):
    main(MEASURE)
    card = Prior.from_pretrained("prior").card
    other = make(seed=1)
    other.card = card
    other.save_pretrained("prior")
    with pytest.raises(SystemExit):
        main(["verify", "prior", "--data", "x.npy"])
    assert capsys.readouterr().out.count("WRONG denoising error") >= 3


def test_what_needs_no_data_is_checked(folder, capsys):
    (folder / "README.md").write_text("the best prior ever")
    with pytest.raises(SystemExit) as caught:
        main(["verify", "prior"])
    assert caught.value.code == 1
    assert "WRONG README.md: not as it was written from the card" in capsys.readouterr().out
    overflow = make()
    overflow.network.stem.weight.data *= 1e38
    overflow.save_pretrained("overflow")
    with pytest.raises(SystemExit):
        main(["verify", "overflow"])
    assert "WRONG D(x; σ): not finite" in capsys.readouterr().out
    (folder / "model.safetensors").write_bytes(b"")
    fails(["verify", "prior"], "SHA-256")


@pytest.mark.filterwarnings("ignore")  # Lightning's own
def test_figures_of_training_are_measured_again(data):
    """The record of a validation in training, on one process and on three, gives its figures to rounding."""
    import lightning as L  # noqa: N812

    from dpnp_training import ImageData, ScoreMatching
    from dpnp_training.verify import record_of

    prior = make()
    module = ScoreMatching(prior.network, prior.preconditioning, noise_bands=(0.05, 0.5, 5.0), seed=3)
    source = ImageData("x.npy", validation_fraction=0.5, batch_size=8, seed=5)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, limit_val_batches=2
    )
    (figures,) = trainer.validate(module, source, verbose=False)
    record = record_of(source, batches=2, processes=1, seed=3, device="cpu")
    assert record.data == {"source": "x.npy", "validation_fraction": 0.5, "seed": 5}
    measured = denoising_errors(prior, source.validation_set, [(0.05, 0.5), (0.5, 5.0)], record)
    assert measured[0.05, 0.5].mse == pytest.approx(figures["val/mse/0.05-0.5"], rel=1e-5)
    assert measured[0.5, 5.0].mse == pytest.approx(figures["val/mse/0.5-5"], rel=1e-5)
    assert measured[0.5, 5.0].images == 16

    # 20 images dealt to 3 processes in turn: 7 each, the first one twice
    many = dataclasses.replace(record, batches=1, batch_size=7, processes=3)
    images, errors = source.validation_set, []
    for rank in range(3):
        x_0 = torch.stack([images[i % 20] for i in range(rank, 21, 3)])
        generator = torch.Generator().manual_seed(derive_seed(3, 1, 0, 0))
        sigma = 0.05 * 10 ** torch.rand(21, generator=generator)[rank::3]
        streams = [torch.Generator().manual_seed(derive_seed(generator.initial_seed(), i)) for i in range(rank, 21, 3)]
        w = torch.stack([torch.randn(x_0[0].shape, generator=stream) for stream in streams])
        x = x_0 + sigma[:, None, None, None] * w
        errors.append((prior(x, sigma) - x_0).square().mean())
    found = denoising_errors(prior, images, [(0.05, 0.5)], many)[0.05, 0.5]
    assert found.images == 21
    assert found.mse == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)


def test_bad_records_and_arguments_are_refused(folder, data):
    fails(["measure", "prior", "x.npy", "--images", "0"], "images = 0")
    fails(["verify", "prior", "--data", "x.npy", "--tolerance", "-1"], "tolerance = -1")
    fails(["measure", "prior", "nothing.npy"], "does not exist")
    fails(["measure", "fashion", "x.npy"], "'fashion' is not the folder of a prior")
    with pytest.raises(ValueError, match="batches = 0"):
        ValidationRecord(0, 8)
    prior = make(validation={"batches": 3}, metrics={"val/mse/0.2-0.6": 0.1})
    prior.save_pretrained("prior")
    fails(["verify", "prior", "--data", "x.npy"], "validation record cannot be read")


# --- precision, pictures, migration ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 6), (3, 6, 8)])
def test_half_precision_is_measured(shape):
    prior = make(shape=shape)
    half, brain = (round_weights(prior, precision, images=3) for precision in ("float16", "bfloat16"))
    assert prior.card.precision == {}
    assert prior.network.stem.weight.dtype == torch.float32
    losses = [torch.tensor(list(p.card.precision["difference"].values())) for p in (half, brain)]
    assert losses[0].shape == (6, 2)
    assert bool((losses[0] > 0).all())
    assert bool((losses[0] < 0.01).all())
    # bfloat16 has three bits less
    assert bool(((losses[1] / losses[0]).mean(0) > 3).all())
    # what is measured is what a reader of the folder gets
    loaded = Prior.from_pretrained(half.save_pretrained("half"))
    x = torch.randn(2, *shape)
    change = float((loaded(x, 1.0) - prior(x, 1.0)).square().mean() / prior(x, 1.0).square().mean()) ** 0.5
    assert 0 < change < 10 * losses[0][:, 0].max()
    assert (
        Path("half/model.safetensors").stat().st_size
        < 0.7 * prior.save_pretrained("full").joinpath("model.safetensors").stat().st_size
    )
    with pytest.raises(ValueError, match="precision = 'int8'; allowed are float32"):
        round_weights(prior, "int8")
    prior.network.stem.weight.data *= 1e6
    with pytest.raises(PriorError, match=r"stem\.weight has values beyond its range"):
        round_weights(prior, "float16")


@pytest.fixture
def checkpoint():
    """A run's folder as training leaves it."""
    prior = make()
    described = {"network": describe(prior.network), "preconditioning": describe(prior.preconditioning)}
    card = dataclasses.asdict(make(metrics={"val/mse/0.2-0.6": 0.1}, training={"images seen": 5}).card)
    weights = {f"ema.ema_model.{key}": value for key, value in prior.network.state_dict().items()}
    Path("run/checkpoints").mkdir(parents=True)
    torch.save({"prior": {**described, "card": card}, "state_dict": weights}, "run/checkpoints/last.ckpt")
    return "run/checkpoints/last.ckpt"


def test_export_draws_a_picture_and_says_where_all_comes_from(checkpoint, capsys):
    from PIL import Image

    main(["export", checkpoint, "out", "--samples", "4", "--license", "CC0-1.0", "--data_revision", "abc123"])
    with Image.open("out/samples.png") as picture:
        size = picture.size
    assert size == (3 * 1 + 2 * SHAPE[2], 3 * 1 + 2 * SHAPE[1])
    prior = Prior.from_pretrained("out")
    assert (
        prior.card.training.items()
        >= {"images seen": 5, "checkpoint": "last.ckpt", "revision of the data": "abc123"}.items()
    )
    text = Path("out/README.md").read_text()
    for words in ("license: cc0-1.0", "](samples.png)", "abc123", "| 0.2 to 0.6 |", "exported by"):
        assert words in text
    # the run's own picture comes first, the newest one
    Path("run/samples").mkdir()
    for step in (9, 10):
        Path(f"run/samples/step_{step:08d}.png").write_bytes(b"%d" % step)
    main(["export", checkpoint, "out"])
    assert Path("out/samples.png").read_bytes() == b"10"
    main(["export", checkpoint, "bare", "--samples", "0"])
    assert not Path("bare/samples.png").exists()
    assert "samples.png" not in Path("bare/README.md").read_text()
    capsys.readouterr()
    main(["export", checkpoint, "half", "--samples", "0", "--precision", "bfloat16"])
    assert re.search(r"σ 0.2-0.6: \d\.\d\de-0\d of D\(x; σ\)", capsys.readouterr().out)
    assert "rounded to bfloat16" in Path("half/README.md").read_text()
    assert Prior.from_pretrained("half").network.stem.weight.dtype == torch.float32
    fails(["export", checkpoint, "no", "--samples", "-1"], "samples = -1")
    assert not Path("no").exists()


def test_migrate_writes_the_present_format(folder, capsys, caplog):
    config = json.loads((folder / "config.json").read_text())
    weights = (folder / "model.safetensors").read_bytes()
    for key in ("written_by", "readme_sha256", "content_sha256"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config | {"format_version": 1}))
    (folder / "README.md").write_text("of old")
    fails(["push", "prior", "organisation/name"], "older format; bring it to the present one by `dpnp-prior migrate`")
    main(["verify", "prior"])
    assert "signature: none, the folder is of an older format" in capsys.readouterr().out
    caplog.clear()
    main(["migrate", "prior", "--directory", "new"])
    assert "read as version 2" in caplog.text
    assert json.loads((folder / "config.json").read_text())["format_version"] == 1
    main(["migrate", "prior"])
    caplog.clear()
    for name in ("prior", "new"):
        assert Path(name, "model.safetensors").read_bytes() == weights
        assert Path(name, "samples.png").read_bytes() == b"a picture"
        main(["verify", name])
    assert not caplog.records
