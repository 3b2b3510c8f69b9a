"""What rounding layer after layer needs beside what every rounding does."""
