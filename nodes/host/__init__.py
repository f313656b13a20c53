"""Everything that knows ComfyUI's model patching; nothing here knows a formula."""

from .branch import Branch as Branch
from .branch import RescaleMode as RescaleMode
from .branch import Side as Side
from .networks import network_of as network_of
from .perturbation import Site as Site
from .sampling import attach as attach
from .sampling import guided as guided
