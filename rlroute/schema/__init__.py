"""What the files of a run's record hold, by name, and within which limits. A schema only ever grows: fields that old
records lack are marked. :mod:`rlroute.reading` holds every record to this page; docs/records.md shows it as a table.

Figures by site are lists in the order of the model's routed sites; their keys follow from the configuration
(:func:`rlroute.sites.sites`). None stands for what is not defined; there is no NaN and no infinity.

Shape suffixes: L routed sites, E experts.
"""

from rlroute.schema.measured import Dependence, Measured, MeasuredFlops, MeasuredMode, Regret, RouterFlops
from rlroute.schema.record import RunRecord, Stored, untimed
from rlroute.schema.rows import EvalRow, LoadRow, Losses, Sampled, TrainRow
from rlroute.schema.run import (
    Asked,
    Configuration,
    DataFields,
    Described,
    Environment,
    MadeFrom,
    ModelFields,
    NamedRouter,
    SitedRouter,
    StartFields,
    TrainFields,
)
from rlroute.schema.summary import (
    Batches,
    BudgetSpent,
    Data,
    Divergence,
    Failure,
    Fingerprint,
    Gate,
    ModelCosts,
    Seal,
    Summary,
)
from rlroute.schema.values import (
    MOST,
    Amount,
    ConfigHash,
    Digest,
    Moment,
    Name,
    Noted,
    Number,
    Part,
    Signed,
    Vio,
    Whole,
)

__all__ = [
    "MOST",
    "Amount",
    "Asked",
    "Batches",
    "BudgetSpent",
    "ConfigHash",
    "Configuration",
    "Data",
    "DataFields",
    "Dependence",
    "Described",
    "Digest",
    "Divergence",
    "Environment",
    "EvalRow",
    "Failure",
    "Fingerprint",
    "Gate",
    "LoadRow",
    "Losses",
    "MadeFrom",
    "Measured",
    "MeasuredFlops",
    "MeasuredMode",
    "ModelCosts",
    "ModelFields",
    "Moment",
    "Name",
    "NamedRouter",
    "Noted",
    "Number",
    "Part",
    "Regret",
    "RouterFlops",
    "RunRecord",
    "Sampled",
    "Seal",
    "Signed",
    "SitedRouter",
    "StartFields",
    "Stored",
    "Summary",
    "TrainFields",
    "TrainRow",
    "Vio",
    "Whole",
    "untimed",
]
