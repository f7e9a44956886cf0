"""What the files of a run's record hold, by name, and within which limits. A schema only ever grows: fields that old
records lack are marked. :mod:`rlroute.reading` holds every record to this page; docs/records.md shows it as a table.

Figures by site are lists in the order of the model's routed sites; their keys follow from the configuration
(:func:`rlroute.model.transformer.sites`). None stands for what is not defined; there is no NaN and no infinity.

Shape suffixes: L routed sites, E experts.
"""

from rlroute.schema.measured import (
    Dependence as Dependence,
)
from rlroute.schema.measured import (
    Measured as Measured,
)
from rlroute.schema.measured import (
    MeasuredFlops as MeasuredFlops,
)
from rlroute.schema.measured import (
    MeasuredMode as MeasuredMode,
)
from rlroute.schema.measured import (
    RouterFlops as RouterFlops,
)
from rlroute.schema.record import (
    RunRecord as RunRecord,
)
from rlroute.schema.record import (
    Stored as Stored,
)
from rlroute.schema.rows import (
    EvalRow as EvalRow,
)
from rlroute.schema.rows import (
    LoadRow as LoadRow,
)
from rlroute.schema.rows import (
    Sampled as Sampled,
)
from rlroute.schema.rows import (
    TrainRow as TrainRow,
)
from rlroute.schema.run import (
    Configuration as Configuration,
)
from rlroute.schema.run import (
    DataFields as DataFields,
)
from rlroute.schema.run import (
    Described as Described,
)
from rlroute.schema.run import (
    Environment as Environment,
)
from rlroute.schema.run import (
    MadeFrom as MadeFrom,
)
from rlroute.schema.run import (
    ModelFields as ModelFields,
)
from rlroute.schema.run import (
    NamedRouter as NamedRouter,
)
from rlroute.schema.run import (
    SitedRouter as SitedRouter,
)
from rlroute.schema.run import (
    TrainFields as TrainFields,
)
from rlroute.schema.summary import (
    Batches as Batches,
)
from rlroute.schema.summary import (
    BudgetSpent as BudgetSpent,
)
from rlroute.schema.summary import (
    Data as Data,
)
from rlroute.schema.summary import (
    Divergence as Divergence,
)
from rlroute.schema.summary import (
    Failure as Failure,
)
from rlroute.schema.summary import (
    Fingerprint as Fingerprint,
)
from rlroute.schema.summary import (
    Gate as Gate,
)
from rlroute.schema.summary import (
    ModelCosts as ModelCosts,
)
from rlroute.schema.summary import (
    Seal as Seal,
)
from rlroute.schema.summary import (
    Summary as Summary,
)
from rlroute.schema.values import (
    MOST as MOST,
)
from rlroute.schema.values import (
    Amount as Amount,
)
from rlroute.schema.values import (
    ConfigHash as ConfigHash,
)
from rlroute.schema.values import (
    Digest as Digest,
)
from rlroute.schema.values import (
    Name as Name,
)
from rlroute.schema.values import (
    Noted as Noted,
)
from rlroute.schema.values import (
    Number as Number,
)
from rlroute.schema.values import (
    Part as Part,
)
from rlroute.schema.values import (
    Signed as Signed,
)
from rlroute.schema.values import (
    Vio as Vio,
)
from rlroute.schema.values import (
    Whole as Whole,
)
