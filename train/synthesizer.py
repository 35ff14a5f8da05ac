"""`TableSynthesizer`: a table model with the conventions of scikit-learn."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError

from ..configs.load import load_config
from ..configs.runs import resolve
from ..configs.table import TableConfig
from ..model.codecs.table.codec import Encoding, TableCodec, check_columns
from ..model.codecs.table.columns import Schema, infer
from ..model.storage import save_checkpoint
from ..sample.table.imputation import expected
from ..sample.table.pipeline import TablePipeline
from ..sample.table.rows import Generator
from .table_trainer import TableTrainer


class TableSynthesizer(BaseEstimator):
    """Learn a mixed-type table; draw new rows, rows under conditions, and the empty cells of others.

    >>> rows = TableSynthesizer().fit(df).sample(1000, where={"education": "Masters", "age": (30, 40)})

    Args:
        config: a YAML file, or a shipped one: "table/default", "table/paper".
        overrides: settings of it, e.g. ["train.steps=2000"].
        schema: kinds of the columns, default inferred: a `Schema`, or a YAML file.
        seed: of weights, training and samples; default the config's.
        device: cpu, cuda, …; default a GPU if there is one.
        out: run folder with checkpoints; the same folder resumes. Default: nothing is kept on disk.
        verbose: show progress.
    """

    def __init__(
        self,
        config: str | Path = "table/default",
        overrides: Sequence[str] = (),
        schema: Schema | str | Path | None = None,
        seed: int | None = None,
        device: str | None = None,
        out: str | Path | None = None,
        verbose: bool = False,
    ):
        self.config, self.overrides, self.schema = config, overrides, schema
        self.seed, self.device, self.out, self.verbose = seed, device, out, verbose

    def fit(self, table: pd.DataFrame, y=None) -> TableSynthesizer:
        """Train on a table; `y` is not used.

        Raises:
            ValueError: a table or schema that cannot be modelled (names the column), a wrong setting.
        """
        if not isinstance(table, pd.DataFrame):
            raise ValueError(f"fit takes a DataFrame, got {type(table).__name__}")
        overrides = [*self.overrides, *([] if self.seed is None else [f"seed={self.seed}"])]
        config = load_config(self.config, overrides, TableConfig)
        schema = self.schema if isinstance(self.schema, Schema) else None
        if schema is None:
            schema = infer(table) if self.schema is None else Schema.load(self.schema)
        codec = TableCodec.fit(table, schema, Encoding(**config.encoding.model_dump()), config.seed)
        coded = codec.encode(table, config.seed)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary if self.out is None else self.out)
            trainer = TableTrainer(config, folder, codec, *coded, device=self.device, quiet=not self.verbose)
            self.system_: TablePipeline = trainer.run()
            self._files = trainer.files()
        self.schema_, self.n_features_in_ = schema, len(schema.columns)
        self.feature_names_in_ = [column.name for column in schema.columns]
        return self

    def sample(
        self,
        n: int | None = None,
        where: Mapping | None = None,
        balance: str | None = None,
        seed: int | None = None,
        steps: int | None = None,
    ) -> pd.DataFrame:
        """n new rows (default: as many as there were in training).

        Args:
            where: {column: value} or {column: (low, high)}, None for an open end; NaN asks for an empty cell.
            balance: a categorical column all of whose values come equally often.
            steps: network evaluations; default the config's.
        """
        system = self._fitted()
        return self._generator(seed, steps).table(system.codec.rows if n is None else n, where, balance)

    def impute(
        self, table: pd.DataFrame, how: str = "draw", draws: int | None = None, seed: int | None = None
    ) -> pd.DataFrame | list[pd.DataFrame] | tuple[pd.DataFrame, pd.DataFrame]:
        """The table with its empty cells filled; all others stay as they are.

        Args:
            how: "draw" fills with one draw from the model, or with several (`draws`): a list of tables.
                "expected" fills with the mean of a number or date (over `draws`, default 20, where it needs drawing)
                and the likeliest value of a category, and returns a second table of the same shape with the spread:
                the standard deviation, or the chance of another value; NaN where the cell was filled.
        """
        if how not in ("draw", "expected"):
            raise ValueError(f"how must be draw or expected, got {how!r}")
        check_columns(table, list(self._fitted().codec.columns))
        generator = self._generator(seed, None)
        count = (1 if how == "draw" else 20) if draws is None else draws
        if count < 1:
            raise ValueError(f"draws must be at least 1, got {count}")
        if how == "expected":
            return expected(generator, table, count)
        cells = generator.cells_of(table)
        tables = [generator.impute(table, i, cells) for i in range(count)]
        return tables[0] if draws is None else tables

    def save(self, path: str | Path) -> Path:
        """Write the model into a folder; the checkpoint inside it is returned."""
        self._fitted()
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        return save_checkpoint(folder, self.system_.config.train.steps, self._files, keep=1)

    @classmethod
    def load(cls, path: str | Path, weights: str = "ema", device: str | None = None) -> TableSynthesizer:
        """The model of a run folder, of a checkpoint, or of what `save` wrote."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        folder = resolve(path)
        made = cls(device=device)
        made.system_ = TablePipeline.from_pretrained(folder, weights, device)
        made._files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        made.schema_ = made.system_.codec.schema
        made.feature_names_in_ = [column.name for column in made.schema_.columns]
        made.n_features_in_ = len(made.feature_names_in_)
        return made

    def _fitted(self) -> TablePipeline:
        if not hasattr(self, "system_"):
            raise NotFittedError("this TableSynthesizer is not fitted: call fit or load first")
        return self.system_

    def _generator(self, seed: int | None, steps: int | None) -> Generator:
        system = self._fitted()
        return Generator(system, steps, system.config.seed if seed is None else seed, self.verbose)
