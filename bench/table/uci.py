"""The six UCI tables of the paper: where they are, how they are read, and the digests of their rows."""

from __future__ import annotations

import dataclasses

ADULT = (
    "age workclass fnlwgt education education.num marital.status occupation relationship race sex capital.gain "
    "capital.loss hours.per.week native.country income"
)
MAGIC = "Length Width Size Conc Conc1 Asym M3Long M3Trans Alpha Dist class"


@dataclasses.dataclass(frozen=True)
class UciTable:
    """Location of a table at UCI and its official preprocessing.

    Args:
        path: of the archive, below UCI.
        member, test_member: files of the archive; test_member if the set has its own test file.
        task: binclass or regression, of the column `target`.
        categorical: categorical columns apart from the target; all others are numerical.
        rows: numbers of training and test rows.
        columns: names of the columns where the file has no header.
    """

    title: str
    path: str
    member: str
    task: str
    target: str
    categorical: tuple[str, ...]
    rows: tuple[int, int]
    test_member: str | None = None
    columns: tuple[str, ...] | None = None


SETS = {
    "adult": UciTable(
        "Adult (Census Income), Barry Becker and Ronny Kohavi (1996)",
        "2/adult.zip",
        "adult.data",
        "binclass",
        "income",
        ("workclass", "education", "marital.status", "occupation", "relationship", "race", "sex", "native.country"),
        (32561, 16281),
        "adult.test",
        tuple(ADULT.split()),
    ),
    "default": UciTable(
        "Default of Credit Card Clients, I-Cheng Yeh (2009)",
        "350/default+of+credit+card+clients.zip",
        "default of credit card clients.xls",
        "binclass",
        "default payment next month",
        ("SEX", "EDUCATION", "MARRIAGE", "PAY_0", "PAY_2", "PAY_3", "PAY_4", "PAY_5", "PAY_6"),
        (27000, 3000),
    ),
    "shoppers": UciTable(
        "Online Shoppers Purchasing Intention Dataset, C. Okan Sakar and Yomi Kastro (2018)",
        "468/online+shoppers+purchasing+intention+dataset.zip",
        "online_shoppers_intention.csv",
        "binclass",
        "Revenue",
        ("Month", "OperatingSystems", "Browser", "Region", "TrafficType", "VisitorType", "Weekend"),
        (11097, 1233),
    ),
    "magic": UciTable(
        "MAGIC Gamma Telescope, R. Bock (2004)",
        "159/magic+gamma+telescope.zip",
        "magic04.data",
        "binclass",
        "class",
        (),
        (17117, 1902),
        columns=tuple(MAGIC.split()),
    ),
    "beijing": UciTable(
        "Beijing PM2.5, Song Chen (2017)",
        "381/beijing+pm2+5+data.zip",
        "PRSA_data_2010.1.1-2014.12.31.csv",
        "regression",
        "pm2.5",
        ("year", "month", "day", "hour", "cbwd"),
        (37581, 4176),
    ),
    "news": UciTable(
        "Online News Popularity, Kelwin Fernandes et al. (2015)",
        "332/online+news+popularity.zip",
        "OnlineNewsPopularity.csv",
        "regression",
        "shares",
        ("data_channel", "weekday"),
        (35679, 3965),
    ),
}
DIGESTS = {  # rows_digest of (train, test), computed from tables checked against the official preprocessing
    "adult": (
        "b89a88f1f999255082117441be74b8fa98fb48ff4a6ce8fe175c8a82e7968ac5",
        "dfe90203b94ca16dd8f0d94c0e7552200902dd837918fdcdc09df44cfb0a2737",
    ),
    "shoppers": (
        "55dfdcdc882c3387c2a489d148a2e5fd7e1a775dce6f05b785774e8e0b34a28b",
        "423f684edc9de3a6d2a427fea4f4146ed2fe4df8cc00c942c7fefa6e7b1367d0",
    ),
    "magic": (
        "864e3a496ea219f05dd0a19c1d3fbb7526c7cc26f47e5f635198f088ecdbe686",
        "39735b14b6e6509534cd7e9c6b6a980e064b61d70e9d3e3cb10dc20e64db65cb",
    ),
    "beijing": (
        "a97d3080681e197247d0e103ad7ed6fed1b11dc02e8213a83a1453cef57ca60d",
        "278ddd2d771b42dc7910ca7baea684b473e2608dfc99c05569557a301a9b67f1",
    ),
}
