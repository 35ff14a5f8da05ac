"""TableDiT, its losses, its training and its samplers against the official tabular code."""

from __future__ import annotations

import pytest
import torch

from anystate import kernels
from anystate.diffusion import Gaussian, Linear, LogLinear, Masked, Space, Weighting
from anystate.kernels import reference
from anystate.model.official.table import load_official, to_official

TARGETS = {"linear_beta": None, "linear_beta2": None, "imputation_cat": "cat", "imputation_num": "num"}


@pytest.fixture(scope="module", params=["one_time", "two_time"])
def table(request, golden_table):
    return golden_table(request.param)


@pytest.fixture
def tolerance(table):
    return table.config["tolerances"]["suggested"]


class Case:
    """A golden network split into groups, and its columns gathered from them."""

    def __init__(self, golden, target: str | None = None, prefix: str = "weights/", scale: float = 1.0):
        c = golden.config["model"]
        self.golden, self.target, self.numerical, self.states = golden, target, c["d_numerical"], c["categories"]
        self.model, self.unused = load_official(golden.below(prefix), c["num_heads"], target)
        recipe = golden.config["recipe"]
        schedule = Linear(**_betas(golden), scale=scale)
        self.space = Space(
            {
                m: Gaussian((g.columns,), schedule, recipe["early_eps"], "time")
                if m in self.model.numerical
                else Masked(
                    g.columns,
                    max(g.states),
                    LogLinear(golden.config["schedules"]["loglinear"]["eps"]),
                    recipe["early_eps"],
                    mask_logit="kept",
                )
                for m, g in self.model.groups.items()
            }
        )

    def split(self, numbers, tokens) -> dict:
        """Official tensors as {group: tensor}; the mask, K of a column there, becomes its group's mask."""
        parts = {}
        for m, g in self.model.groups.items():
            if m in self.model.numerical:
                parts[m] = numbers[:, :1] if m == "target" else numbers[:, numbers.shape[1] - g.columns :]
            else:
                part = tokens[:, :1] if m == "target" else tokens[:, tokens.shape[1] - g.columns :]
                sizes = torch.tensor(g.states)
                parts[m] = torch.where(part == sizes, max(sizes), part)
        return parts

    def times(self, t, s=None) -> dict:
        return {m: s if m == "target" else t for m in self.model.groups}

    def official(self, out: dict) -> dict:
        """Our outputs as {num, cat_0, …} with K + 1 logits."""
        parts = {"num": torch.cat([out[m] for m in self.model.numerical], 1)}
        column = 0
        for m in self.model.categorical:
            for c, k in enumerate(self.model.groups[m].states):
                parts[f"cat_{column}"] = torch.cat([out[m][:, c, :k], out[m][:, c, -1:]], -1)
                column += 1
        return parts


def _betas(golden) -> dict:
    c = golden.config["schedules"]["linear_beta"]
    return {"beta_min": c["beta_min"], "beta_max": c["beta_max"]}


def scale_of(section: str) -> float:
    return 0.5 if section == "linear_beta2" else 1.0


def loss_sections(golden) -> list[str]:
    return sorted({key.split("/")[1] for key in golden.tensors if key.startswith("loss/") and key.endswith("/loss")})


def default_target(golden) -> str | None:
    return "cat" if golden.config["model"]["two_time"] else None


def test_official_weights_round_trip(table):
    case = Case(table, default_target(table))
    official, back = table.below("weights/"), to_official(case.model)
    assert case.unused == []
    assert set(back) == set(official)
    assert all(torch.equal(back[key], value) for key, value in official.items())
    assert sum(p.numel() for p in case.model.parameters()) == table.config["parameters"]


def test_a_missing_official_key_is_named(table):
    state = table.below("weights/")
    gone = "blocks.1.attn.proj.bias"
    with pytest.raises(ValueError, match=gone):
        load_official({key: value for key, value in state.items() if key != gone})


def test_outputs_and_intermediates_equal_the_official_network(table, tolerance, close):
    case = Case(table, default_target(table))
    atol = tolerance["forward_abs"]
    x = case.split(table["forward/x_num"], table["forward/x_cat"])
    states = []
    hooks = [block.register_forward_hook(lambda _, __, out: states.append(out.total())) for block in case.model.blocks]
    with torch.no_grad():
        out = case.official(case.model(x, case.times(table["forward/t"], table["forward/s"])))
        tokens = case.model.embed(x)
    for hook in hooks:
        hook.remove()
    close(tokens, table["inter/tokens"], atol, "tokens")
    for i, state in enumerate(states):
        close(state, table[f"inter/block_{i}"], atol, f"block {i}")
    for name, value in out.items():
        close(value, table[f"forward/{name}"], atol, name)
        close(value, table[f"forward_f64/{name}"], atol, f"{name} in float64")
    if "forward_s_none/num" in table:
        with torch.no_grad():
            alone = {m: t for m, t in case.times(table["forward/t"]).items() if m != "target"}
            out = case.official(case.model(x, alone))
        for name, value in out.items():
            close(value, table[f"forward_s_none/{name}"], atol, f"{name} without s")


def official_losses(case: Case, golden, x0: dict, xt: dict, t: dict, noise) -> torch.Tensor:
    """The official loss from our parts: weights 1 for numbers, 1/t for tokens, sums over columns, mean over rows."""
    recipe, out = golden.config["recipe"], case.space.evaluate(case.model, xt, t)
    eps = torch.cat([out[m] for m in case.model.numerical], 1)
    loss = recipe["lambda_num"] * (eps - noise).square().sum(1).mean()
    for m in case.model.categorical:
        process = case.space[m]
        rows = process.loss(out[m], x0[m], xt[m], None) * process.shape[0]
        loss = loss + Weighting(process, "elbo", recipe["lambda_cat"])(rows, t[m]).mean()
    return loss


@pytest.mark.parametrize("section", TARGETS)
def test_losses_and_gradients_given_the_official_draws(table, tolerance, close, section):
    if section not in loss_sections(table):
        pytest.skip(f"these vectors have no loss {section}")
    case, g = (
        Case(table, TARGETS[section] or default_target(table), scale=scale_of(section)),
        table.below(f"loss/{section}/"),
    )
    x0 = case.split(table["loss/x_num"], table["loss/x_cat"])
    xt = case.split(g["x_num_noisy"], g["x_cat_noisy"])
    t = {m: v.double() for m, v in case.times(g["t"], g.get("s", g["t"])).items()}
    for m in case.model.numerical:
        process, noise = case.space[m], case.split(g["noise"], g["x_cat_noisy"])[m]
        alpha, sigma = (f(t[m]).float()[:, None] for f in (process.schedule.alpha, process.schedule.sigma))
        close(alpha * x0[m] + sigma * noise, xt[m], tolerance["perturb_abs"], f"noised {m}")
    for m in case.model.categorical:
        u = g["u_imp"] if m == "target" and "u_imp" in g else case.split(g["noise"], g["u_cat"])[m]
        gone = u <= case.space[m].schedule.prob(t[m])[:, None].float()
        assert torch.equal(torch.where(gone, case.space[m].mask_id, x0[m]), xt[m])
    loss = official_losses(case, table, x0, xt, t, g["noise"])
    torch.testing.assert_close(loss[None], g["loss"], rtol=tolerance["loss_rel"], atol=0)
    expected = {key.removeprefix("grads/"): value for key, value in g.items() if key.startswith("grads/")}
    if expected:
        loss.backward()
        for p in case.model.parameters():
            p.data = p.grad if p.grad is not None else torch.zeros_like(p)
        for name, value in to_official(case.model).items():
            if name in expected:
                close(value, expected[name], tolerance["grad_rel_to_max"] * expected[name].abs().max().item(), name)


def test_optimizer_steps(table, tolerance, close):
    if "optim/loss" not in table:
        pytest.skip("these vectors have no optimizer steps")
    case, g, recipe = Case(table, default_target(table)), table.below("optim/"), table.config["recipe"]["adamw"]
    decays = {key.split("/")[0] for key in g if key.startswith("ema_")}
    optimizer = torch.optim.AdamW(
        case.model.parameters(), recipe["lr"], recipe["betas"], weight_decay=recipe["weight_decay"]
    )
    x0 = case.split(table["loss/x_num"], table["loss/x_cat"])
    ema = {name: {key: v.clone() for key, v in to_official(case.model).items()} for name in decays}
    for i, lr in enumerate(g["lr"].tolist()):
        optimizer.param_groups[0]["lr"] = lr
        t = {m: g["t"][i].double() for m in case.model.groups}
        xt = {}
        for m, noise in case.split(g["noise"][i], g["u_cat"][i]).items():
            process = case.space[m]
            if m in case.model.numerical:
                alpha, sigma = (f(t[m]).float()[:, None] for f in (process.schedule.alpha, process.schedule.sigma))
                xt[m] = alpha * x0[m] + sigma * noise
            else:
                xt[m] = torch.where(noise <= process.schedule.prob(t[m])[:, None].float(), process.mask_id, x0[m])
        loss = official_losses(case, table, x0, xt, t, g["noise"][i])
        torch.testing.assert_close(loss.detach(), g["loss"][i], rtol=tolerance["optim_loss_rel"], atol=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, average in ema.items():
            decay = float(name.removeprefix("ema_"))
            for key, v in to_official(case.model).items():
                average[key] = decay * average[key] + (1.0 - decay) * v
    for prefix, tensors in {"weights": to_official(case.model), **ema}.items():
        for key, value in tensors.items():
            expected = g[f"{prefix}/{key}"]
            if key.endswith("attn.qkv.bias"):  # the key part cannot change any output and drifts by rounding
                (q, _, v), (eq, _, ev) = value.chunk(3), expected.chunk(3)
                value, expected = torch.cat([q, v]), torch.cat([eq, ev])
            close(value, expected, tolerance["optim_weights_abs"], f"{prefix} {key}")


@pytest.mark.parametrize("section", ["linear_beta", "linear_beta2"])
def test_single_steps_of_numbers(table, tolerance, close, monkeypatch, section):
    cases = sorted({key.split("/")[2] for key in table.tensors if key.startswith(f"step/{section}/")})
    schedule = Linear(**_betas(table), scale=scale_of(section))
    for i in cases:
        g = table.below(f"step/{section}/{i}/")
        n = len(g["x_num"])
        t = g["t"].double().expand(n)
        beta, sigma, dt = schedule.beta(t), schedule.sigma(t), -g["h"].double().expand(n)
        ode = kernels.heun_predict(g["x_num"], g["score_num"], beta, sigma, dt)
        monkeypatch.setattr(reference, "normal_like", lambda *_, g=g: g["noise"])
        sde = reference.sde_step(g["x_num"], g["score_num"], beta, sigma, dt, None)
        scale = max(1.0, g["em"].abs().max().item())
        close(ode, g["pfode"], tolerance["num_update_abs"] * scale, f"pfode {i}")
        close(sde, g["em"], tolerance["num_update_abs"] * scale, f"em {i}")


@pytest.mark.parametrize("kind", ["em", "pfode"])
def test_replayed_sampler(table, tolerance, close, monkeypatch, kind):
    """The official trajectory with its own Gaussian draws and Poisson counts, states of every evaluation."""
    case, g = Case(table, default_target(table)), table.below(f"replay/{kind}/")
    times = [*g["times"].double().tolist(), 0.0]
    n, steps = len(g["init"]), len(times) - 1
    first_tokens = torch.tensor(case.states).expand(n, -1)
    x = case.split(g["init"], first_tokens)
    for k in range(steps):
        expected = case.split(g["x_num"][k], g["x_cat"][k])
        t = torch.full((n,), times[k], dtype=torch.float64)
        now = case.times(t, t)
        for m in x:
            if m in case.model.numerical:
                close(x[m], expected[m], tolerance["replay_abs"], f"step {k} {m}")
            else:
                assert torch.equal(x[m], expected[m]), f"step {k} {m}"
        with torch.no_grad():
            out = case.model(x, {m: v.float() for m, v in now.items()})
        h = times[k] - times[k + 1]
        for m in case.model.numerical:
            schedule = case.space[m].schedule
            args = (x[m], out[m], schedule.beta(t), schedule.sigma(t), torch.full_like(t, -h))
            if kind == "em":
                noise = case.split(g["noise"][k], first_tokens)[m]
                monkeypatch.setattr(reference, "normal_like", lambda *_, noise=noise: noise)
                x[m] = reference.sde_step(*args, None)
            else:
                x[m] = reference.heun_predict(*args)
        column = 0
        for m in case.model.categorical:
            moved = x[m].clone()
            for c, k_states in enumerate(case.model.groups[m].states):
                masked = x[m][:, c] == case.space[m].mask_id
                if k < steps - 1:
                    counts = g[f"poisson_{column}"][k].long()
                    jump = masked & (counts.sum(-1) == 1)
                    moved[:, c] = torch.where(jump, counts.argmax(-1), x[m][:, c])
                else:  # the official code takes the likeliest state for what is left
                    moved[:, c] = torch.where(masked, out[m][:, c, :k_states].argmax(-1), x[m][:, c])
                column += 1
            x[m] = moved
    final = case.split(g["final_num"], g["final_cat"])
    for m, value in x.items():
        close(value.double(), final[m].double(), tolerance["replay_abs"], f"final {m}")


def test_tau_leaping_has_the_official_jump_probabilities(table, tolerance):
    """The official counts of 200,000 masked rows against the closed form and against our kernel's probabilities."""
    for i, cell in enumerate(table.config["tau"]["cells"]):
        prob, closed, counts = (
            table[f"tau/{i}/{name}"].double().flatten() for name in ("prob", "closed_form", "counts")
        )
        rate = torch.tensor(cell["h"] / cell["t"], dtype=torch.float64)
        scores, total = reference.masked_log_scores(prob.log()[None], None, 1.0, cell["K"], True)
        move = reference.move_probability("tau", rate, total)
        ours = (move[:, None] * scores.exp() / total[:, None]).flatten()
        torch.testing.assert_close(ours, closed[:-1], rtol=1e-5, atol=1e-9)
        n = counts.sum()
        z = (counts[:-1] - n * ours) / (n * ours * (1 - ours)).sqrt()
        assert z.abs().max() < tolerance["tau_z"]
