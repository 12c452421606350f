from .config import AnalysisConfig as AnalysisConfig
from .gradients import Decomposition as Decomposition
from .gradients import decompose as decompose
from .result import Analysis as Analysis
from .splits import terms as terms
from .watch import GradientWatch as GradientWatch
from .watch import Probe as Probe
