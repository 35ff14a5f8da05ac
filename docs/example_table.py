"""Synthetic rows, rows under conditions and filled-in cells of UCI Adult, which comes with the package.

    python docs/example_table.py

Some minutes on two CPU cores; the second run loads the model that the first one saved.
"""

from pathlib import Path

import numpy as np

from anystate import TableSynthesizer
from anystate.train.data.bundled import load_bundled

FOLDER = Path("runs/example_table")

train, test = load_bundled("adult")
if FOLDER.exists():
    model = TableSynthesizer.load(FOLDER)
else:
    model = TableSynthesizer(verbose=True).fit(train)
    model.save(FOLDER)

print("Five new rows:")
print(model.sample(5).to_string())

print("\nMasters of 30 to 40 years, as many with high income as without:")
rows = model.sample(1000, where={"education": "Masters", "age": (30, 40)}, balance="income")
print(rows.groupby("income")[["age", "hours.per.week"]].mean().round(1).to_string())

print("\nHeld-out rows with a fifth of their cells removed, filled in:")
removed = np.random.default_rng(0).random(test.shape) < 0.2
holes = test.mask(removed).head(1000)
filled, spread = model.impute(holes, "expected")
for name in ("education", "income", "age"):
    empty = holes[name].isna()
    right, truth = filled[name][empty], test[name].head(1000)[empty]
    if model.columns_.columns[name].is_numerical:
        print(f"{name}: RMSE {np.sqrt(((right - truth) ** 2).mean()):.2f}, standard deviation {truth.std():.2f}")
    else:
        print(
            f"{name}: {(right == truth).mean():.0%} right, most frequent value {truth.value_counts(True).iloc[0]:.0%}"
        )
