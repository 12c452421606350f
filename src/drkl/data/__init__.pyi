from .classification import LabelledRow as LabelledRow
from .config import DataConfig as DataConfig
from .examples import Example as Example
from .examples import load_examples as load_examples
from .rows import rows_from as rows_from
from .tokenize import DropReport as DropReport
from .tokenize import Row as Row
