from .cached import TeacherCache as TeacherCache
from .config import TeacherConfig as TeacherConfig
from .live import LiveTeacher as LiveTeacher
from .served import ServedTeacher as ServedTeacher
