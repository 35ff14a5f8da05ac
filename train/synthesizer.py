"""`TableSynthesizer`: a table model with the conventions of scikit-learn."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError

from ..configs.interruption import Interrupted
from ..configs.load import load_config
from ..configs.runs import resolve
from ..model.build import Codecs
from ..model.codecs.table.codec import TableCodec
from ..model.codecs.table.dialect import Dialect
from ..model.codecs.table.schema import Schema, warnings_of
from ..model.storage import save_checkpoint
from ..sample.pipeline import Pipeline
from ..sample.table.cells import columns_of
from ..sample.table.config import csv_settings, missing_strings, row_codec, schema_of
from ..sample.table.imputation import expected
from ..sample.table.incomplete import Incomplete
from ..sample.table.rows import TableSampler, whole_number
from .data.dataset import InMemory
from .data.examples import encode
from .trainer import Trainer

log = logging.getLogger(__name__)


class TableSynthesizer(BaseEstimator):
    """A diffusion model of a mixed-type table: new rows, rows under conditions, imputation of missing cells.

    >>> rows = TableSynthesizer().fit(df).sample(1000, where={"education": "Masters", "age": (30, 40)})

    Args:
        config: a YAML file, or a shipped one: "table/default", "table/paper".
        overrides: settings that replace those of the config, e.g. ["train.steps=2000"].
        schema: what the columns are, a `Schema`, its content as a mapping, or a YAML file; the rest is inferred.
        seed: of weights, training and samples; default the config's.
        device: cpu, cuda, …; default a GPU if there is one.
        out: run folder with checkpoints; the same folder resumes. Default: nothing is kept on disk.
        verbose: show progress.

    Attributes:
        pipeline_: the trained `Pipeline`.
        schema_: the schema of the training table.
        n_features_in_, feature_names_in_: number and names of its columns.
    """

    def __init__(
        self,
        config: str | Path = "table/default",
        overrides: Sequence[str] = (),
        schema: Schema | Mapping | str | Path | None = None,
        seed: int | None = None,
        device: str | None = None,
        out: str | Path | None = None,
        verbose: bool = False,
    ):
        self.config, self.overrides, self.schema = config, overrides, schema
        self.seed, self.device, self.out, self.verbose = seed, device, out, verbose

    def fit(self, table: pd.DataFrame, y: object = None) -> TableSynthesizer:
        """Train on a table; `y` is not used. What is assumed of its columns is a warning each.

        Raises:
            ValueError: a table or schema that cannot be modelled (names the column), or a wrong setting.
            Interrupted: Ctrl-C (a KeyboardInterrupt) or SIGTERM; with `out`, a checkpoint of the step was written.
        """
        if not isinstance(table, pd.DataFrame):
            raise ValueError(f"fit takes a DataFrame, got {type(table).__name__}")
        seed = [] if self.seed is None else [f"seed={self.seed}"]
        config = load_config(self.config, [*self.overrides, *seed])
        modality, codec = row_codec(config)
        codec.schema = schema_of(table, config, self.schema)
        for line in warnings_of(codec.schema):
            warnings.warn(line, stacklevel=2)
        codec.fit(table, config.seed)
        codecs: Codecs = {modality: codec}
        rows = encode(InMemory({modality: table}), config, codecs, "the table")
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary if self.out is None else self.out)
            trainer = Trainer(config, folder, self.device, (rows, rows), quiet=not self.verbose, codecs=codecs)
            try:
                self.pipeline_: Pipeline = trainer.run()
            except Interrupted as error:
                raise error if self.out else Interrupted.at_step(trainer.state.step, error.number, False) from None
            self.pipeline_.net.requires_grad_(True)  # as after `load`: without it, torch.matmul rounds in another way
            self._files = trainer.files()
        return self._described(codec.schema)

    def sample(
        self,
        n: int | None = None,
        where: Mapping | pd.DataFrame | Sequence[Mapping] | None = None,
        balance: str | Sequence[str] | None = None,
        seed: int | None = None,
        steps: int | None = None,
    ) -> pd.DataFrame:
        """n new rows (default: as many as there were in training).

        Args:
            where: {column: condition}. A condition is a value; (low, high) of a number or date, None for an open end; a
                list of conditions, one of which must hold; None for a missing cell; a text such as ">30", ">=18, <65",
                "!=north", "in {a, b}" or "not null". Or rows of conditions, a DataFrame or a list of mappings, where
                empty cells are no conditions: row i of the result has those of row i, and n (default their number) may
                be a multiple of them.
            balance: a categorical column whose values are equally frequent, or several, whose combinations are, of
                those that the model makes.
            seed: row i is a function of (seed, i); default the config's.
            steps: sampling steps; default the config's.

        Raises:
            ValueError: an unknown column, or a condition that no value satisfies.
        """
        return self._sampler(seed, steps).sample(n, where, balance)

    def impute(
        self, table: pd.DataFrame, how: str = "draw", draws: int | None = None, seed: int | None = None
    ) -> pd.DataFrame | list[pd.DataFrame] | tuple[pd.DataFrame, pd.DataFrame]:
        """The table with its missing cells filled; all others stay as they are.

        Columns may be in any order. One that the table lacks is filled and comes last, and one that the model does not
        have stays as it is. A cell that the model cannot read, such as a category that training did not have, stays
        too and counts as unknown: a line of the log says so.

        Args:
            how: "draw" samples the missing cells from the model. "expected" fills them with the mean of a number or
                date and the most probable category.
            draws: with "draw", the number of tables to return, as a list; default one table. With "expected", draws
                that the mean of a number is estimated from; default 20.

        Returns:
            With "expected", (filled table, uncertainty), the latter of the same shape: the standard deviation of a
            number, the probability of any other category; NaN where nothing was filled.

        Raises:
            ValueError: the table has none of the model's columns, or one twice.
        """
        if how not in ("draw", "expected"):
            raise ValueError(f"how must be draw or expected, got {how!r}")
        sampler = self._sampler(seed)
        count = (1 if how == "draw" else 20) if draws is None else draws
        if count < 1:
            raise ValueError(f"draws must be at least 1, got {count}")
        given = Incomplete.of(sampler.codec, table)
        for note in given.notes:
            log.warning(note)
        if how == "expected":
            return expected(sampler, given, count)
        cells = sampler.observed_cells(given.known)
        tables = [sampler.impute(given, draw, cells) for draw in range(count)]
        return tables[0] if draws is None else tables

    def save(self, path: str | Path) -> Path:
        """Write the model into a folder and return the checkpoint folder inside it."""
        self._fitted()
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        return save_checkpoint(folder, self.pipeline_.config.train.steps, self._files, keep=1)

    @classmethod
    def load(cls, path: str | Path, weights: str = "ema", device: str | None = None) -> TableSynthesizer:
        """The model of a run folder, of a checkpoint folder, or of a folder that `save` wrote."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        folder = resolve(path)
        model = cls(device=device)
        model.pipeline_ = Pipeline.from_pretrained(folder, weights, device)
        model._files = {
            str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()
        }
        return model._described(model.columns_.schema)

    @property
    def columns_(self) -> TableCodec:
        """The codec of the columns."""
        return columns_of(self._fitted())

    @property
    def missing_(self) -> list[str]:
        """The strings that mean a missing cell in a CSV."""
        return missing_strings(self._fitted().config)

    @property
    def dialect_(self) -> Dialect:
        """How the CSV of the training rows was written: separator, encoding and decimal mark."""
        settings = csv_settings(self._fitted().config)
        return Dialect.of(*(settings.get(key) for key in ("sep", "encoding", "decimal")))

    def _described(self, schema: Schema) -> TableSynthesizer:
        self.schema_, self.n_features_in_ = schema, len(schema.columns)
        self.feature_names_in_ = [column.name for column in schema.columns]
        return self

    def _fitted(self) -> Pipeline:
        if not hasattr(self, "pipeline_"):
            raise NotFittedError("this TableSynthesizer is not fitted: call fit or load first")
        return self.pipeline_

    def _sampler(self, seed: int | None, steps: int | None = None) -> TableSampler:
        pipeline = self._fitted()
        return TableSampler(
            pipeline, steps, pipeline.config.seed if seed is None else whole_number("seed", seed), self.verbose
        )
